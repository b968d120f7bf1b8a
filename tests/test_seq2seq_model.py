"""The model: padding, one call against single steps, the paper's equations, and learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.config import (
    BRIDGES,
    CELLS,
    ModelConfig,
    TrainingConfig,
)
from fused_attn.seq2seq.data.examples import Examples, pad
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.search.search import search
from fused_attn.seq2seq.training.trainer import Trainer
from fused_attn.seq2seq.vocabulary import EOS

SIZE = 12  # of both vocabularies

SHAPE: dict[str, Any] = {"hidden": 16, "embedding": 8, "bidirectional": False}
CONFIGS = {
    **{
        f"{cell}-{score}-{layers}{'-bi' if both else ''}": ModelConfig(
            cell=cell, hidden=16, embedding=8, layers=layers, bidirectional=both, score=score
        )
        for cell in CELLS
        for score in ("dot", "general", "concat")
        for layers, both in ((1, True), (2, False))
    },
    "location": ModelConfig(score="location", max_source=9, **SHAPE),
    "none": ModelConfig(score="none", **SHAPE),
    "deep": ModelConfig(hidden=12, encoder_hidden=7, embedding=9, layers=2, encoder_layers=3),
    "shallow encoder": ModelConfig(layers=3, encoder_layers=1, bridge="last", **SHAPE),
    "residual": ModelConfig(layers=3, residual=True, bridge="mean", **SHAPE),
    "shared": ModelConfig(share=True, layers=2, bridge="last", tie="all", **SHAPE),
    "tied": ModelConfig(tie="output", cell="gru", bridge="zero", **SHAPE),
    "reversed": ModelConfig(reverse_source=True, **SHAPE),
    "input feeding": ModelConfig(input_feeding=True, layers=2, **SHAPE),
    "input feeding none": ModelConfig(input_feeding=True, score="none", cell="gru", **SHAPE),
    "coverage": ModelConfig(coverage=True, score="concat", attn_dim=7, **SHAPE),
    "everything fed": ModelConfig(
        coverage=True, input_feeding=True, score="concat", cell="rnn", hidden=16, embedding=8
    ),
    "monotonic": ModelConfig(local="monotonic", window=2, **SHAPE),
    "predictive": ModelConfig(local="predictive", window=3, score="dot", **SHAPE),
}
architectures = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def make_model(config: ModelConfig, dtype: torch.dtype = torch.float64) -> Seq2Seq:
    torch.manual_seed(0)
    return Seq2Seq(config, SIZE, SIZE).to(dtype).eval()


def make_sequences(count: int, longest: int = 7) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, SIZE, (n,), generator=generator).tolist() for n in lengths]


def gradients(model: Seq2Seq, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@architectures
def test_a_batch_is_its_samples(config: ModelConfig) -> None:
    """The mean loss over all tokens, and its gradients, equal those of single samples."""
    model = make_model(config)
    examples = Examples.of(make_sequences(6), make_sequences(6, longest=4)[::-1])
    batch = examples.batch(torch.arange(6))
    assert int(batch.source_lengths.min()) < batch.source.shape[1]
    together = model.loss(batch.source, batch.source_lengths, batch.target)
    alone = torch.zeros((), dtype=torch.float64)
    for row in range(6):
        one = examples.batch(torch.tensor([row]))
        loss = model.loss(one.source, one.source_lengths, one.target)
        alone = alone + loss * one.tokens / batch.tokens
    torch.testing.assert_close(together, alone)
    for got, expected in zip(gradients(model, together), gradients(model, alone), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-10)


@architectures
def test_what_stands_in_the_padding_changes_nothing(config: ModelConfig) -> None:
    model = make_model(config)
    examples = Examples.of([[3, 4, 5, 6], [7, 8]], [[3, 4], [5]])
    batch = examples.batch(torch.arange(2))
    other = batch.source.clone()
    other[1, 2:] = 9
    inputs = batch.target[:, :-1]
    expected, _ = model(batch.source, batch.source_lengths, inputs)
    assert torch.equal(model(other, batch.source_lengths, inputs)[0], expected)


@architectures
def test_one_call_equals_step_by_step(config: ModelConfig) -> None:
    model = make_model(config)
    source, lengths = pad(make_sequences(5))
    inputs = torch.randint(1, SIZE, (5, 6))
    memory, state = model.encode(source, lengths)
    prepared = model.prepare_memory(memory, lengths)
    logits, weights = [], []
    for step in inputs.split(1, dim=1):
        some, state, alignment = model.decode(step, state, prepared, return_weights=True)
        logits.append(some)
        weights.append(alignment)
    expected, whole = model(source, lengths, inputs, return_weights=True)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected)
    if config.score == "none":
        assert whole is None and weights == [None] * 6
        return
    aligned = torch.cat(weights, dim=1)
    torch.testing.assert_close(aligned, whole)
    if config.local is None:
        torch.testing.assert_close(aligned.sum(dim=-1), torch.ones(5, 6, dtype=torch.float64))
    beyond = torch.arange(source.shape[1]) >= lengths[:, None]
    assert not aligned.transpose(1, 2)[beyond].any()


@architectures
def test_beams_share_the_memory(config: ModelConfig) -> None:
    """K beams for each of B sentences, with a memory of B rows, equal B K sentences."""
    model = make_model(config)
    source, lengths = pad(make_sequences(3))
    beams = 4
    inputs = torch.randint(1, SIZE, (3 * beams, 3))
    each = torch.arange(3).repeat_interleave(beams)
    expected, _ = model(source[each], lengths[each], inputs)
    memory, state = model.encode(source, lengths)
    prepared, state = model.prepare_memory(memory, lengths), state.index_select(each)
    for t in range(3):
        logits, state, weights = model.decode(
            inputs[:, t : t + 1], state, prepared, return_weights=True
        )
        torch.testing.assert_close(logits, expected[:, t : t + 1])
        assert weights is None or weights.shape == (3 * beams, 1, source.shape[1])


@architectures
def test_greedy_result_does_not_depend_on_the_batch(config: ModelConfig) -> None:
    model = make_model(config)
    with torch.no_grad():
        model.output.weight *= 10  # so that the rows differ
        model.output.bias[EOS] += 2.5  # and some of them end early
    sources = make_sequences(40)
    together = [found[0] for found in search(model, *pad(sources), return_weights=True)]
    ended = [len(h.tokens) < 2 * len(s) + 10 for h, s in zip(together, sources, strict=True)]
    assert any(ended)
    for source, found in zip(sources, together, strict=True):
        ((alone,),) = search(model, *pad([source]), return_weights=True)
        assert found.tokens == alone.tokens
        assert found.log_prob == pytest.approx(alone.log_prob)
        assert len(found.tokens) <= 2 * len(source) + 10
        assert found.weights is not None and alone.weights is not None
        size = 0 if config.score == "none" else len(found.tokens)
        assert found.weights.shape == (size, len(source))
        torch.testing.assert_close(found.weights, alone.weights)


def test_greedy_takes_the_likeliest_symbol_of_the_one_call_path() -> None:
    model = make_model(ModelConfig(hidden=16, embedding=8))
    source, lengths = pad([[3, 4, 5]])
    ((found,),) = search(model, source, lengths)
    inputs = torch.tensor([[1, *found.tokens]])
    best = model(source, lengths, inputs)[0][:, :, 2:].argmax(dim=-1)[0] + 2  # no PAD, no BOS
    assert best[: len(found.tokens)].tolist() == found.tokens
    assert found.weights is None


def cell_by_hand(layer: nn.LSTM, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One step of an LSTM (B, width), from the equations."""
    gates = x @ layer.weight_ih_l0.T + layer.bias_ih_l0 + h @ layer.weight_hh_l0.T
    i, f, g, o = (gates + layer.bias_hh_l0).chunk(4, dim=1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


@pytest.mark.parametrize("feeding", [False, True])
def test_the_decoder_is_the_paper(feeding: bool) -> None:
    """Two residual layers, general attention, tanh(W_c [c; h]) and input feeding, by hand."""
    options = {"hidden": 6, "embedding": 6, "layers": 2, "residual": True, "dropout": 0.0}
    model = make_model(ModelConfig(**options, input_feeding=feeding, bidirectional=False))
    source, lengths = pad([[3, 4, 5, 6, 7], [8, 9]])
    inputs = torch.tensor([[1, 5, 6], [1, 7, 8]])
    memory, state = model.encode(source, lengths)
    h, c = (list(part) for part in state.hidden)
    fed = torch.zeros(2, 6, dtype=torch.float64)
    attention = model.decoder.attention
    logits = []
    for t in range(3):
        x = model.target_embedding(inputs[:, t])
        x = torch.cat((x, fed), dim=1) if feeding else x
        for number, layer in enumerate(model.decoder.stack.layers):
            h[number], c[number] = cell_by_hand(layer, x, h[number], c[number])
            x = h[number] + x if x.shape == h[number].shape else h[number]
        scores = torch.einsum("bd,ed,bse->bs", x, attention.query_proj.weight, memory)
        scores = scores.masked_fill(torch.arange(5) >= lengths[:, None], -torch.inf)
        context = torch.einsum("bs,bse->be", scores.softmax(-1), memory)
        fed = torch.tanh(torch.cat((context, x), dim=1) @ attention.output_proj.weight.T)
        logits.append(fed @ model.output.weight.T + model.output.bias)
    torch.testing.assert_close(model(source, lengths, inputs)[0], torch.stack(logits, dim=1))


def test_a_reversed_source_keeps_its_order_in_the_memory() -> None:
    plain = make_model(ModelConfig(**SHAPE))
    turned = make_model(ModelConfig(reverse_source=True, **SHAPE))
    source, lengths = pad([[3, 4, 5, 6], [7, 8]])
    backwards, _ = pad([[6, 5, 4, 3], [8, 7]])
    memory, state = turned.encode(source, lengths)
    expected, first = plain.encode(backwards, lengths)
    torch.testing.assert_close(state.hidden, first.hidden)
    torch.testing.assert_close(memory[0], expected[0].flip(0))
    torch.testing.assert_close(memory[1, :2], expected[1, :2].flip(0))
    assert not memory[1, 2:].any()


@pytest.mark.parametrize("bridge", BRIDGES)
def test_bridges(bridge: str) -> None:
    shape = SHAPE | {"layers": 2, "encoder_layers": 3}
    model = make_model(ModelConfig(bridge=bridge, **shape))
    source, lengths = pad([[3, 4, 5, 6], [7, 8]])
    x = model.source_embedding(source)
    finals = []  # for both sentences, (h, c) of each of the three layers
    for row, length in enumerate(lengths.tolist()):
        states, last = x[row : row + 1, :length], []
        for layer in model.encoder.stack.layers:
            states, (h, c) = layer(states)
            last.append((h[0], c[0]))
        finals.append((states.mean(dim=1), last))
    _, state = model.encode(source, lengths)
    for part, found in enumerate(state.hidden):
        for level in range(2):
            top = torch.cat([last[level + 1][part] for _, last in finals])
            mean = torch.cat([average for average, _ in finals])
            expected = {
                "zero": lambda top=top: torch.zeros_like(top),
                "last": lambda top=top: top,
                "dense": lambda top=top, part=part: torch.tanh(model.bridge.maps[part](top)),
                "mean": lambda mean=mean, part=part: torch.tanh(model.bridge.maps[part](mean)),
            }[bridge]()
            torch.testing.assert_close(found[level], expected)


def test_shared_and_tied_parameters_are_one(tmp_path: Path) -> None:
    """In the model, in a checkpoint, and in a model loaded from it."""
    model = make_model(CONFIGS["shared"])
    assert model.encoder.stack is model.decoder.stack
    assert model.output.weight is model.target_embedding.weight is model.source_embedding.weight
    assert len(list(model.parameters())) < len(model.state_dict())
    files.save(tmp_path / "one", {}, model.state_dict(), {})
    other = make_model(CONFIGS["shared"])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(files.load_tensors(tmp_path / "one", files.MODEL))
    assert other.output.weight is other.target_embedding.weight
    torch.testing.assert_close(other.state_dict(), model.state_dict())
    with pytest.raises(ValueError, match="tie all needs one vocabulary"):
        Seq2Seq(CONFIGS["shared"], 5, 6)


def test_label_smoothing_and_coverage_by_hand() -> None:
    model = make_model(CONFIGS["coverage"])
    source, lengths = pad([[3, 4, 5, 6], [7, 8]])
    target, _ = pad([[1, 5, 6, 7, 2], [1, 8, 2]])
    got = model.loss(source, lengths, target, label_smoothing=0.2, coverage_weight=0.7)
    logits, weights = model(source, lengths, target[:, :-1], return_weights=True)
    log_probs = torch.log_softmax(logits, dim=-1)
    total = torch.zeros((), dtype=torch.float64)
    for row, count in enumerate((4, 2)):
        covered = torch.zeros(4, dtype=torch.float64)
        for t in range(count):
            right = log_probs[row, t, target[row, t + 1]]
            total = total - 0.8 * right - 0.2 * log_probs[row, t].mean()
            total = total + 0.7 * torch.minimum(weights[row, t], covered).sum()
            covered = covered + weights[row, t]
    torch.testing.assert_close(got, total / 6)


def test_scheduled_sampling_gives_the_likeliest_symbol() -> None:
    """At 1 the decoder gets only its own symbols; below, each step of each row is drawn alone."""
    model = make_model(ModelConfig(**SHAPE))
    source, lengths = pad(make_sequences(60))
    inputs = torch.randint(3, SIZE, (60, 8))
    fed: list[Tensor] = []
    decode = model.decode

    def record(step: Tensor, *rest: Any, **options: Any) -> Any:
        fed.append(step)
        return decode(step, *rest, **options)

    model.decode = record  # type: ignore[method-assign]
    logits, _ = model(source, lengths, inputs, sampling=1.0)
    own = logits.argmax(dim=-1)
    assert torch.equal(torch.cat(fed, dim=1)[:, 1:], own[:, :-1])
    assert torch.equal(fed[0], inputs[:, :1])
    torch.testing.assert_close(model(source, lengths, torch.cat(fed, dim=1))[0], logits)
    fed.clear()
    torch.manual_seed(3)
    logits, _ = model(source, lengths, inputs, sampling=0.3)
    given, own = torch.cat(fed, dim=1)[:, 1:], logits.argmax(dim=-1)[:, :-1]
    differ = own != inputs[:, 1:]
    heard = (given == own)[differ]
    assert ((given == own) | (given == inputs[:, 1:])).all()
    assert 0.2 < heard.double().mean() < 0.4
    assert (
        len({tuple(row.tolist()) for row in (given == own)}) > 10
    )  # steps are drawn independently
    fed.clear()
    logits, _ = model(source, lengths, inputs, sampling=0.3, sampling_per="example")
    given, own = torch.cat(fed, dim=1)[:, 1:], logits.argmax(dim=-1)[:, :-1]
    whole = [bool((row == mine).all()) for row, mine in zip(given, own, strict=True)]
    right = [bool((row == true).all()) for row, true in zip(given, inputs[:, 1:], strict=True)]
    assert all(a != b for a, b in zip(whole, right, strict=True))  # a whole row, or none of it
    assert 0.1 < sum(whole) / len(whole) < 0.5


@pytest.mark.parametrize("sampling", [0.5, 1.0])
def test_gradients_under_scheduled_sampling(sampling: float) -> None:
    """They are those of the sequence that was fed; sampling itself has no gradient."""
    model = make_model(CONFIGS["input feeding"])
    source, lengths = pad(make_sequences(4))
    target = torch.randint(3, SIZE, (4, 6))
    torch.manual_seed(0)
    loss = model.loss(source, lengths, target, sampling=sampling)
    assert all(g.isfinite().all() and g.any() for g in gradients(model, loss))


@pytest.mark.parametrize("score", ["dot", "general", "concat"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_it_learns_to_reverse(cell: str, score: str) -> None:
    sources = make_sequences(2000, longest=5)
    examples = Examples.of(sources, [source[::-1] for source in sources])
    torch.manual_seed(1)
    config = ModelConfig(cell=cell, hidden=48, embedding=16, score=score, dropout=0.0)
    recipe = TrainingConfig(epochs=8, batch_size=64, lr=1e-2)
    trainer = Trainer(Seq2Seq(config, SIZE, SIZE), examples, recipe)
    while not trainer.finished:
        assert trainer.run_epoch(lambda _: None, lambda: False)
        trainer.finish_epoch()
    fresh = make_sequences(300, longest=5)
    found = search(trainer.model.eval(), *pad(fresh))
    right = sum(h.tokens == s[::-1] for (h,), s in zip(found, fresh, strict=True))
    assert right / len(fresh) > 0.9
