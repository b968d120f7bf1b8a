"""`LuongDecoder` against a plain decoder in float64 (tests/decoder_oracle.py)."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import decoder_oracle
import pytest
import torch
from torch import Tensor, nn

from fused_attn import DecoderState, LuongAttention, LuongDecoder

N, T, S, V = 3, 5, 7, 9
LENGTHS = torch.tensor([S, 0, 4])


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def make(**options: Any) -> LuongDecoder:
    """A small decoder in float64; ``options`` replace those below."""
    torch.manual_seed(0)
    usual: dict[str, Any] = {"input_size": 4, "hidden": 6, "dtype": torch.float64}
    usual |= {"embedding": V, "vocab_size": V}
    attention = {"score": "general", "memory_dim": 5, "output_dim": 6}
    return LuongDecoder(**usual | {"attention": attention} | options).eval()


def memory_of(decoder: LuongDecoder, spoiled: bool = True) -> Tensor:
    """A memory (N, S, E), with NaN in the padding."""
    width = 5 if decoder.attention is None else decoder.attention.memory_dim
    memory = draw(N, S, width, seed=1)
    outside = torch.arange(S) >= LENGTHS[:, None]
    return memory.masked_fill(outside[..., None], torch.nan) if spoiled else memory


def symbols(steps: int = T) -> Tensor:
    return torch.randint(0, V, (N, steps), generator=torch.Generator().manual_seed(2))


def run(decoder: LuongDecoder, inputs: Tensor, **rest: Any) -> Any:
    """A call with the usual memory, or with none for a decoder without attention."""
    if decoder.attention is None:
        return decoder(inputs, **rest)
    wanted = {"return_weights": True} | rest
    return decoder(inputs, memory_of(decoder), LENGTHS, **wanted)


CONCAT = {"score": "concat", "memory_dim": 5, "attn_dim": 7, "output_dim": 6, "bias": True}
DECODERS: dict[str, dict[str, Any]] = {
    "lstm": {},
    "gru": {"cell": "gru"},
    "rnn": {"cell": "rnn"},
    "without_biases": {"bias": False, "output_bias": False, "cell": "gru"},
    "three_layers": {"layers": 3},
    "residual": {"layers": 3, "residual": True, "input_size": 6},
    "dot": {"attention": {"score": "dot", "output_dim": 6, "scale": 0.7}},
    "concat": {"attention": CONCAT},
    "weight_norm": {"attention": {**CONCAT, "weight_norm": True, "scale": "learned"}},
    "location": {"attention": {"score": "location", "max_source": 9, "bias": True}},
    "context": {"attention": {"memory_dim": 5}, "vocab_size": V},
    "output_bias": {"attention": {"memory_dim": 5, "output_dim": 3, "output_bias": True}},
    "general_bias": {"attention": {"memory_dim": 5, "output_dim": 3, "bias": True}},
    "no_attention": {"attention": None, "layers": 2},
    "no_attention_fed": {"attention": None, "input_feeding": True},
    "fed": {"input_feeding": True},
    "fed_context": {"input_feeding": True, "attention": {"memory_dim": 5}, "cell": "rnn"},
    "fed_residual": {
        **{"input_feeding": True, "layers": 2, "residual": True, "cell": "gru"},
        **{"input_size": 4, "attention": {"memory_dim": 5, "output_dim": 2}},
    },
    "monotonic": {"attention": {"memory_dim": 5, "local": "monotonic", "window": 2}},
    "monotonic_fed": {
        **{"attention": {**CONCAT, "local": "monotonic", "window": 1}, "input_feeding": True}
    },
    "predictive": {"attention": {**CONCAT, "local": "predictive", "window": 2}},
    "coverage": {"attention": {**CONCAT, "coverage": True}},
    "coverage_fed": {
        **{"attention": {**CONCAT, "coverage": True}, "input_feeding": True, "cell": "gru"}
    },
    "tied": {"tie_embedding": True, "output_proj_dim": 4, "vocab_size": None},
    "projected": {"output_proj_dim": 3},
    "no_output": {"vocab_size": None},
    "wide": {"input_size": 17, "hidden": 7, "embedding": V, "cell": "gru"},
    "narrow": {
        **{"input_size": 1, "hidden": 1, "attention": {"memory_dim": 1, "output_dim": 1}},
        **{"input_feeding": True},
    },
}


@pytest.mark.parametrize("name", DECODERS)
def test_all_steps_are_those_of_the_oracle(name: str) -> None:
    decoder = make(**DECODERS[name])
    inputs = symbols()
    output, state = run(decoder, inputs)
    embedded = decoder.embedding.weight.detach()[inputs]
    expected = decoder_oracle.decode(decoder, embedded, memory_of(decoder), LENGTHS)
    torch.testing.assert_close(output.attentional, expected["attentional"], rtol=0, atol=1e-12)
    for got, wanted in zip(state.hidden, expected["hidden"], strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    if decoder.attention is not None:
        torch.testing.assert_close(output.weights, expected["weights"], rtol=0, atol=1e-12)
        assert not output.weights[1].any()
    if decoder.output_layer is None:
        assert output.logits is None and "logits" not in expected
    else:
        torch.testing.assert_close(output.logits, expected["logits"], rtol=0, atol=1e-12)
    assert state.position == T


@pytest.mark.parametrize("cut", [1, 3])
@pytest.mark.parametrize("name", [*DECODERS, "conv"])
def test_the_state_continues_a_sequence(name: str, cut: int) -> None:
    """Two calls give what one call gives, whatever the number of steps of each."""
    conv = {"attention": {**CONCAT, "conv_channels": 3, "conv_width": 3}}
    decoder = make(**DECODERS.get(name, conv))
    inputs = symbols()
    whole, after = run(decoder, inputs)
    first, between = run(decoder, inputs[:, :cut])
    second, last = run(decoder, inputs[:, cut:], state=between)
    for got, *pieces in zip(whole, first, second, strict=True):
        if got is not None:
            torch.testing.assert_close(torch.cat(pieces, 1), got, rtol=0, atol=1e-12)
    torch.testing.assert_close(tuple(last), tuple(after), rtol=0, atol=1e-12)


def test_location_aware_attention_sees_the_weights_of_the_step_before() -> None:
    options = {"score": "concat", "memory_dim": 5, "conv_channels": 3, "conv_width": 3}
    decoder = make(attention=options)
    memory, inputs = memory_of(decoder, False), symbols(2)
    output, state = decoder(inputs, memory, return_weights=True)
    torch.testing.assert_close(state.previous_weights, output.weights[:, 1])
    h, _ = decoder.recurrent(decoder.embedding(inputs), tuple(torch.zeros(2, 1, N, 6).double()))
    rest = {"previous_weights": output.weights[:, 0]}
    context, weights = decoder.attention(h[:, 1], memory, **rest)
    torch.testing.assert_close((output.attentional[:, 1], output.weights[:, 1]), (context, weights))
    assert not torch.allclose(decoder.attention(h[:, 1], memory)[1], weights)


@pytest.mark.parametrize("kind", ["prepared", "masked", "packed", "jagged", "embedded"])
@pytest.mark.parametrize("name", ["lstm", "fed", "coverage"])
def test_other_kinds_of_memory_and_inputs(name: str, kind: str) -> None:
    decoder = make(**DECODERS[name])
    lengths, inputs = torch.tensor([S, 1, 4]), symbols()
    memory = draw(N, S, 5, seed=1)
    expected, _ = decoder(inputs, memory, lengths)
    if kind == "embedded":
        output, _ = decoder(decoder.embedding(inputs), memory, lengths)
    elif kind == "prepared":
        output, _ = decoder(inputs, decoder.attention.prepare_memory(memory, lengths))
    elif kind == "masked":
        mask = torch.arange(S) < lengths[:, None]
        output, _ = decoder(inputs, decoder.attention.prepare_memory(memory, memory_mask=mask))
    elif kind == "packed":
        packed = nn.utils.rnn.pack_padded_sequence(memory, lengths, True, enforce_sorted=False)
        output, _ = decoder(inputs, packed)
    else:
        rows = [row[:length] for row, length in zip(memory, lengths.tolist(), strict=True)]
        output, _ = decoder(inputs, torch.nested.nested_tensor(rows, layout=torch.jagged))
    torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["lstm", "gru", "fed", "coverage", "no_attention"])
def test_a_state_can_be_given(name: str) -> None:
    """Hidden tensors alone are a state; the rest counts as zeros."""
    decoder = make(**DECODERS[name])
    layers = len(decoder.recurrent.layers)
    hidden = tuple(draw(layers, N, 6, seed=3 + i) for i in range(decoder.recurrent.tensors))
    output, _ = run(decoder, symbols(), state=DecoderState(hidden))
    zeros, _ = run(decoder, symbols())
    assert not torch.allclose(output.attentional, zeros.attentional)
    _, state = run(decoder, symbols(1))
    explicit = state._replace(hidden=hidden, position=0)
    blank = {n: t * 0 for n in ("attentional", "coverage") if (t := getattr(state, n)) is not None}
    again, _ = run(decoder, symbols(), state=explicit._replace(**blank))
    torch.testing.assert_close(again.attentional, output.attentional)


def test_no_steps_and_no_rows() -> None:
    for name in ("lstm", "fed", "coverage", "no_attention"):
        decoder = make(**DECODERS[name])
        output, state = run(decoder, symbols(0))
        assert output.attentional.shape == (N, 0, 6) and output.logits.shape == (N, 0, V)
        if decoder.attention is not None:
            assert output.weights.shape == (N, 0, S)
        assert not state.hidden[0].any() and state.position == 0
        memory = None if decoder.attention is None else draw(0, S, 5)
        output, state = decoder(symbols()[:0], memory)
        assert output.logits.shape == (0, T, V) and state.hidden[0].shape[1] == 0


@pytest.mark.parametrize("name", ["lstm", "gru", "fed", "coverage_fed", "predictive", "location"])
def test_a_memory_without_positions_has_the_context_zero(name: str) -> None:
    decoder = make(**DECODERS[name]).train()
    width, inputs = decoder.attention.memory_dim, symbols()
    output, _ = decoder(inputs, draw(N, 0, width), return_weights=True)
    empty = draw(N, S, width) * torch.nan, torch.zeros(N, dtype=torch.int64)
    expected, _ = decoder(inputs, *empty, return_weights=True)
    torch.testing.assert_close(output.logits, expected.logits)
    assert output.weights.shape == (N, T, 0) and not expected.weights.any()
    assert output.logits.isfinite().all()
    found = decoder.greedy(draw(N, 0, width), bos=1, eos=2, max_length=3, return_weights=True)
    assert found.weights.shape == (N, found.symbols.shape[1], 0)
    output.logits.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in decoder.parameters() if p.grad is not None)


def greedy_of(decoder: LuongDecoder, memory: Tensor, eos: int, limit: int) -> list[Any]:
    """For each row its symbols, log probabilities and weights, one oracle step at a time."""
    found = []
    table = decoder.embedding.weight.detach()
    for row in range(N):
        oracle = decoder_oracle.Oracle(decoder, memory[row, : int(LENGTHS[row])])
        chosen, gains, weights, symbol = [], [], [], 1
        while len(chosen) < limit and (not chosen or symbol != eos):
            _, aligned, logits = oracle.advance(table[symbol])
            gains.append(torch.log_softmax(logits, 0).max())
            symbol = int(logits.argmax())
            chosen.append(symbol)
            weights.append(aligned)
        found.append((chosen, torch.stack(gains), torch.stack(weights)))
    return found


@pytest.mark.parametrize("name", ["lstm", "gru", "fed", "coverage_fed", "monotonic", "tied"])
def test_greedy_is_the_most_probable_symbol_of_each_step(name: str) -> None:
    decoder = make(**DECODERS[name])
    with torch.no_grad():  # so that rows end at different steps
        decoder.output_layer.weight.mul_(4.0)
        decoder.recurrent.layers[0].weight_ih.mul_(3.0)
    memory, ends = memory_of(decoder), set()
    for eos in range(V):
        expected = greedy_of(decoder, memory, eos, 12)
        rest = {"bos": 1, "eos": eos, "max_length": 12, "return_weights": True}
        found = decoder.greedy(memory, LENGTHS, **rest)
        lengths = [len(chosen) for chosen, _, _ in expected]
        ends |= set(lengths)
        assert found.lengths.tolist() == lengths and found.symbols.shape == (N, max(lengths))
        for row, (chosen, gains, weights) in enumerate(expected):
            size = len(chosen)
            assert found.symbols[row].tolist() == chosen + [eos] * (max(lengths) - size)
            torch.testing.assert_close(found.log_probs[row, :size], gains)
            assert not found.log_probs[row, size:].any()
            source = weights.shape[1]
            torch.testing.assert_close(found.weights[row, :size, :source], weights)
            assert not found.weights[row, size:].any() and not found.weights[row, :, source:].any()
    assert len(ends) > 1, "all rows ended together"


def test_greedy_without_attention_or_rows() -> None:
    decoder = make(attention=None)
    state = DecoderState(tuple(draw(2, 1, N, 6)))
    found = decoder.greedy(state=state, bos=1, eos=2, max_length=4)
    output, after = decoder(torch.full((N, 1), 1), state=state)
    assert found.weights is None
    assert torch.equal(found.symbols[:, 0], output.logits[:, 0].argmax(-1))
    if found.symbols.shape[1] > 1:
        output, _ = decoder(found.symbols[:, :1], state=after)
        going = found.lengths > 1
        assert torch.equal(found.symbols[going, 1], output.logits[going, 0].argmax(-1))
    rest = {"bos": 1, "eos": 2, "max_length": 4, "return_weights": True}
    empty = make().greedy(draw(0, S, 5), **rest)
    assert empty.symbols.shape == (0, 0) and empty.weights.shape == (0, 0, S)
    assert empty.log_probs.dtype == torch.float64 and empty.lengths.shape == (0,)


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn", "fed", "coverage_fed", "predictive"])
def test_gradients(name: str) -> None:
    decoder = make(**DECODERS[name] | {"input_size": 2, "hidden": 3, "embedding": None})
    names = [n for n, _ in decoder.named_parameters()]
    memory = draw(2, 3, decoder.attention.memory_dim, seed=1)

    def loss(inputs: Tensor, memory: Tensor, *weights: Tensor) -> Any:
        given = (inputs, memory, torch.tensor([3, 2]))
        parameters = dict(zip(names, weights, strict=True))
        output, state = torch.func.functional_call(decoder, parameters, given)
        return output.logits, *state.hidden

    leaves = [draw(2, 2, 2), memory, *(p.detach() for p in decoder.parameters())]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)


@pytest.mark.parametrize("name", DECODERS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    decoder = make(**DECODERS[name]).train()
    output, _ = run(decoder, symbols())
    result = output.attentional if output.logits is None else output.logits
    result.square().sum().backward()
    without = [n for n, p in decoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without
    assert all(p.grad.isfinite().all() for p in decoder.parameters())


def test_dropout_is_only_in_training() -> None:
    decoder = make(layers=2, dropout=0.5, input_dropout=0.5, input_feeding=True)
    plain, _ = run(decoder, symbols())
    expected = run(make(layers=2, input_feeding=True), symbols())[0]
    torch.testing.assert_close(plain.logits, expected.logits)
    dropped, state = run(decoder.train(), symbols())
    share = (dropped.attentional == 0).double().mean()
    assert 0.2 < share < 0.8
    assert torch.equal(state.attentional, dropped.attentional[:, -1])
    between = make(layers=2, dropout=0.5, attention=None).train()
    assert not torch.allclose(
        run(between, symbols())[1].hidden[0][1], run(between.eval(), symbols())[1].hidden[0][1]
    )


@pytest.mark.parametrize("name", ["lstm", "fed", "tied", "coverage_fed"])
def test_copies_and_pickles(name: str) -> None:
    decoder = make(**DECODERS[name])
    expected, state = run(decoder, symbols())
    with io.BytesIO() as file:
        torch.save(decoder.state_dict(), file)
        file.seek(0)
        loaded = make(**DECODERS[name])
        for parameter in loaded.parameters():
            nn.init.zeros_(parameter)
        loaded.load_state_dict(torch.load(file))
    for other in (copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder)), loaded):
        assert torch.equal(run(other, symbols())[0].logits, expected.logits)
        tied = other.output_layer.weight is other.embedding.weight
        assert tied == (name == "tied")
    again = pickle.loads(pickle.dumps(state))
    assert type(again) is DecoderState and torch.equal(again.hidden[0], state.hidden[0])


@pytest.mark.parametrize("name", ["lstm", "gru", "fed", "coverage_fed", "tied"])
def test_other_dtypes_and_autocast(name: str) -> None:
    decoder = make(**DECODERS[name])
    expected, _ = run(decoder, symbols())
    narrow = copy.deepcopy(decoder).to(torch.bfloat16)
    memory = memory_of(decoder)
    output, state = narrow(symbols(), memory.bfloat16(), LENGTHS, return_weights=True)
    assert output.logits.dtype == output.weights.dtype == torch.bfloat16
    torch.testing.assert_close(output.logits.double(), expected.logits, rtol=0.1, atol=0.1)
    narrow(symbols(1), memory.bfloat16(), LENGTHS, state)
    single = copy.deepcopy(decoder).float()
    output, _ = single(symbols(), memory.float(), LENGTHS)
    torch.testing.assert_close(output.logits.double(), expected.logits, rtol=1e-4, atol=1e-4)
    single.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = single(symbols(), memory.float(), LENGTHS)
        output, _ = single(symbols(), memory.float(), LENGTHS, state)
        found = single.greedy(memory.float(), LENGTHS, bos=1, eos=2, max_length=3)
    assert output.logits.dtype == torch.bfloat16 and found.log_probs.dtype == torch.float32
    output.logits.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in single.parameters())


@pytest.mark.parametrize("name", ["lstm", "coverage_fed"])
def test_steps_compile_as_one_graph(name: str) -> None:
    decoder = make(**DECODERS[name])
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    memory = memory_of(decoder)
    expected, after = decoder(symbols(2), memory, LENGTHS)
    output, state = compiled(symbols(2), memory, LENGTHS)
    torch.testing.assert_close(output.logits, expected.logits)
    torch.testing.assert_close(state.hidden, after.hidden)
    output.logits.sum().backward()
    assert all(p.grad is not None for p in decoder.parameters())


def test_meta_tensors_have_the_right_shapes() -> None:
    decoder = make(device="meta", input_feeding=True)
    memory = torch.empty(N, S, 5, device="meta", dtype=torch.float64)
    output, state = decoder(symbols().to("meta"), memory)
    assert output.logits.shape == (N, T, V) and output.logits.device.type == "meta"
    assert state.attentional.shape == (N, 6)


def test_hooks_of_a_recurrent_layer_see_single_steps() -> None:
    decoder = make(layers=2, input_feeding=True)
    expected, _ = run(decoder, symbols())
    seen = []
    decoder.recurrent.layers[1].register_forward_hook(lambda *call: seen.append(call))
    output, _ = run(decoder, symbols())
    assert len(seen) == T
    torch.testing.assert_close(output.logits, expected.logits)


def test_a_shared_embedding_and_a_given_attention() -> None:
    embedding, attention = nn.Embedding(V, 4), LuongAttention(6, 5, output_dim=6)
    decoder = LuongDecoder(4, 6, embedding=embedding, attention=attention, vocab_size=3)
    assert decoder.embedding is embedding and decoder.attention is attention
    assert decoder.output_layer.out_features == 3
    assert "attention=None" not in repr(decoder) and "LuongAttention(" in repr(decoder)
