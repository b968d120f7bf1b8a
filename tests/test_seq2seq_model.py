"""Model and search: padding, one call against step by step, and that it learns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused_attn import problem
from fused_attn.seq2seq.batching import Examples, pad
from fused_attn.seq2seq.config import CELLS, SCORES, ModelConfig, TrainingConfig
from fused_attn.seq2seq.model import Seq2Seq
from fused_attn.seq2seq.search import greedy_search
from fused_attn.seq2seq.training import Trainer

SIZE = 12  # of both vocabularies

architectures = pytest.mark.parametrize(
    "config",
    [
        ModelConfig(cell=cell, hidden=16, embedding=8, layers=layers, bidirectional=both, score=s)
        for cell in CELLS
        for s in SCORES
        for layers, both in ((1, True), (2, False))
    ],
    ids=lambda c: f"{c.cell}-{c.score}-{c.layers}{'-bi' if c.bidirectional else ''}",
)


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
    """The mean loss over all tokens, and its gradients, are those of the samples one by one."""
    model = make_model(config)
    examples = Examples(make_sequences(6), make_sequences(6, longest=4)[::-1])
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


def test_the_scores_are_those_of_the_attention() -> None:
    assert SCORES == problem.SCORES


def test_what_stands_in_the_padding_changes_nothing() -> None:
    model = make_model(ModelConfig(hidden=16, embedding=8))
    examples = Examples([[3, 4, 5, 6], [7, 8]], [[3, 4], [5]])
    batch = examples.batch(torch.arange(2))
    other = batch.source.clone()
    other[1, 2:] = 9
    inputs = batch.target[:, :-1]
    expected = model(batch.source, batch.source_lengths, inputs)
    assert torch.equal(model(other, batch.source_lengths, inputs), expected)


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
        assert alignment is not None
        logits.append(some)
        weights.append(alignment)
    torch.testing.assert_close(torch.cat(logits, dim=1), model(source, lengths, inputs))
    aligned = torch.cat(weights, dim=1)
    torch.testing.assert_close(aligned.sum(dim=-1), torch.ones(5, 6, dtype=torch.float64))
    beyond = torch.arange(source.shape[1]) >= lengths[:, None]
    assert not aligned.transpose(1, 2)[beyond].any()


@architectures
def test_greedy_result_does_not_depend_on_the_batch(config: ModelConfig) -> None:
    model = make_model(config)
    with torch.no_grad():
        model.output.weight *= 10  # so that rows differ, and some end
    sources = make_sequences(40)
    together = greedy_search(model, *pad(sources), return_weights=True)
    ended = [len(h.tokens) < 2 * len(s) + 10 for h, s in zip(together, sources, strict=True)]
    assert any(ended) or config.layers == 2
    for source, found in zip(sources, together, strict=True):
        (alone,) = greedy_search(model, *pad([source]), return_weights=True)
        assert found.tokens == alone.tokens
        assert len(found.tokens) <= 2 * len(source) + 10
        assert found.weights is not None and alone.weights is not None
        assert found.weights.shape == (len(found.tokens), len(source))
        torch.testing.assert_close(found.weights, alone.weights)


def test_greedy_takes_the_likeliest_symbol_of_the_one_call_path() -> None:
    model = make_model(ModelConfig(hidden=16, embedding=8))
    source, lengths = pad([[3, 4, 5]])
    (found,) = greedy_search(model, source, lengths)
    inputs = torch.tensor([[1, *found.tokens]])
    best = model(source, lengths, inputs).argmax(dim=-1)[0].tolist()
    assert best[: len(found.tokens)] == found.tokens
    assert found.weights is None


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("cell", CELLS)
def test_it_learns_to_reverse(cell: str, score: str) -> None:
    sources = make_sequences(2000, longest=5)
    examples = Examples(sources, [source[::-1] for source in sources])
    torch.manual_seed(1)
    config = ModelConfig(cell=cell, hidden=48, embedding=16, score=score, dropout=0.0)
    recipe = TrainingConfig(epochs=8, batch_size=64, lr=1e-2)
    trainer = Trainer(Seq2Seq(config, SIZE, SIZE), examples, recipe)
    while not trainer.finished:
        assert trainer.run_epoch(lambda _: None, lambda: False)
        trainer.finish_epoch()
    fresh = make_sequences(300, longest=5)
    found = greedy_search(trainer.model.eval(), *pad(fresh))
    right = sum(h.tokens == s[::-1] for h, s in zip(found, fresh, strict=True))
    assert right / len(fresh) > 0.9
