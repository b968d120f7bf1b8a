"""`LuongDecoder` in one native call: what it must see, and what it must leave to torch."""

from __future__ import annotations

import copy
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from fused_attn import DecoderState, LuongDecoder, decoder_steps
from fused_attn.recurrent import RecurrentStack

pytest.importorskip("fused_attn._C")

N, T, S, V = 3, 5, 6, 12
GENERAL = {"score": "general", "memory_dim": 5, "output_dim": 8}


def make(kind: type[LuongDecoder] = LuongDecoder, **options: Any) -> LuongDecoder:
    torch.manual_seed(0)
    usual: dict[str, Any] = {"input_size": 8, "hidden": 16, "attention": GENERAL}
    usual |= {"embedding": V, "vocab_size": V, "input_feeding": True}
    decoder = kind(**usual | options).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(3.0)
    return decoder


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def symbols() -> Tensor:
    return torch.randint(0, V, (N, T), generator=torch.Generator().manual_seed(2))


def in_torch(decoder: LuongDecoder) -> LuongDecoder:
    other = copy.deepcopy(decoder)
    other.backend = "eager"
    assert other.not_native_reasons()
    return other


@torch.no_grad()
def check(decoder: LuongDecoder, inputs: Tensor | None = None, **given: Any) -> None:
    """Compare a call, and greedy search, with those of a copy that runs in torch."""
    inputs, memory = symbols() if inputs is None else inputs, draw(N, S, 5)
    oracle = in_torch(decoder)
    output, state = decoder(inputs, memory, return_weights=True, **given)
    expected, after = oracle(inputs, memory, return_weights=True, **given)
    torch.testing.assert_close(tuple(output), tuple(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.hidden, after.hidden, rtol=1e-4, atol=1e-5)
    found = decoder.greedy(memory, bos=1, eos=2, max_length=6, return_weights=True)
    wanted = oracle.greedy(memory, bos=1, eos=2, max_length=6, return_weights=True)
    torch.testing.assert_close(tuple(found), tuple(wanted), rtol=1e-4, atol=1e-5)


CASES: dict[str, tuple[dict[str, Any], Tensor | None]] = {
    "int32 symbols": ({}, symbols().to(torch.int32)),
    "embedded symbols": ({}, draw(N, T, 8)),
    "a residual from what is fed": ({"residual": True, "layers": 2}, None),
    "the same, embedded": ({"residual": True, "embedding": 1000}, draw(N, T, 8)),
    "a residual without feeding": ({"residual": True, "input_size": 16}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_native_calls_are_those_of_torch(case: str) -> None:
    options, inputs = CASES[case]
    decoder = make(**options)
    assert not decoder.not_native_reasons()
    check(decoder, inputs)


CONTINUED: dict[str, dict[str, Any]] = {
    "lstm": {"layers": 2},
    "gru": {"cell": "gru"},
    "coverage": {"attention": GENERAL | {"score": "concat", "coverage": True}},
    "monotonic": {"attention": GENERAL | {"local": "monotonic", "window": 2}},
}


@pytest.mark.parametrize("case", CONTINUED)
@torch.no_grad()
def test_native_calls_continue_from_a_state(case: str) -> None:
    decoder, memory = make(**CONTINUED[case]), draw(N, S, 5)
    assert not decoder.not_native_reasons()
    oracle, stack = in_torch(decoder), decoder.recurrent
    shape = (len(stack.layers), N, stack.hidden)
    found = wanted = DecoderState(tuple(draw(*shape, seed=3 + i) for i in range(stack.tensors)))
    for inputs in symbols().split([3, 2], dim=1):
        output, found = decoder(inputs, memory, state=found)
        expected, wanted = oracle(inputs, memory, state=wanted)
        torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tuple(found), tuple(wanted), rtol=1e-4, atol=1e-5)
    limits: dict[str, int] = {"bos": 1, "eos": 2, "max_length": 6}
    results = decoder.greedy(memory, state=found, **limits)
    torch.testing.assert_close(
        tuple(results), tuple(oracle.greedy(memory, state=wanted, **limits)), rtol=1e-4, atol=1e-5
    )


def set_in(path: str, value: Any) -> Callable[[LuongDecoder], None]:
    def change(decoder: LuongDecoder) -> None:
        *parts, name = path.split(".")
        part: Any = decoder
        for each in parts:
            part = getattr(part, each)
        setattr(part, name, value)

    return change


def fused_step(decoder: LuongDecoder) -> None:
    optimizer = torch.optim.Adam(decoder.parameters(), lr=0.3, fused=True)
    decoder(symbols(), draw(N, S, 5))[0].logits.square().sum().backward()
    optimizer.step()


def fused_step_of_few_symbols(decoder: LuongDecoder) -> None:
    """Changes rows of the embedding in which a `Snapshot` reads no element."""
    optimizer = torch.optim.Adam([decoder.embedding.weight], lr=0.3, fused=True)
    inputs = torch.tensor([[2, 4, 7, 9]]).expand(N, 4)
    decoder(inputs, draw(N, S, 5))[0].logits.square().sum().backward()
    optimizer.step()


def usual_step(decoder: LuongDecoder) -> None:
    optimizer = torch.optim.SGD(decoder.parameters(), lr=0.3)
    decoder(symbols(), draw(N, S, 5))[0].logits.square().sum().backward()
    optimizer.step()


CHANGES: dict[str, Callable[[LuongDecoder], None]] = {
    "scale": set_in("attention.scale", 3.0),
    "window": set_in("attention.window", 3),
    "normalizer": set_in("attention.normalizer", "sparsemax"),
    "residual": set_in("recurrent.residual", True),
    "bias": set_in("output_layer.bias", None),
    "a fused optimizer": fused_step,
    "a fused optimizer of few symbols": fused_step_of_few_symbols,
    "another optimizer": usual_step,
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_seen(name: str) -> None:
    decoder = make(attention=GENERAL | {"local": "monotonic", "window": 1})
    assert not decoder.not_native_reasons()
    with torch.no_grad():
        decoder(symbols(), draw(N, S, 5))
    CHANGES[name](decoder)
    check(decoder)


@torch.no_grad()
def test_a_new_parameter_is_seen_in_the_place_of_the_old_one() -> None:
    decoder = make()
    layer, is_in_place = decoder.output_layer, False
    assert layer is not None
    for seed in range(200):
        decoder(symbols(), draw(N, S, 5))
        place = (id(layer.weight), layer.weight.data_ptr())
        del layer.weight
        others = []
        while len(others) < 20 and not is_in_place:
            others.append(nn.Parameter(torch.empty(V, 8)))
            is_in_place = (id(others[-1]), others[-1].data_ptr()) == place
        others[-1].data.copy_(draw(V, 8, seed=seed))
        layer.weight = others[-1]
        if is_in_place:
            break
    check(decoder)


def test_parameters_of_a_functional_call_are_used() -> None:
    decoder = make()
    for seed in range(4):
        with torch.no_grad():
            weights = {"output_layer.weight": draw(V, 8, seed=seed)}
            output, _ = functional_call(decoder, weights, (symbols(), draw(N, S, 5)))
            expected, _ = functional_call(in_torch(decoder), weights, (symbols(), draw(N, S, 5)))
        torch.testing.assert_close(output.logits, expected.logits)


class Preferring(LuongDecoder):
    """A decoder that changes the logits after the fact."""

    def forward(self, *args: Any, **named: Any) -> Any:
        output, state = super().forward(*args, **named)
        logits = output.logits.clone()
        logits[..., 5] = 1e3
        return output._replace(logits=logits), state


def test_greedy_calls_what_is_around_forward() -> None:
    arguments: dict[str, Any] = {"bos": 1, "eos": 2, "max_length": 3}
    hooked = make()
    hooked.register_forward_hook(
        lambda _, given, result: (
            result[0]._replace(logits=torch.eye(V)[5].expand_as(result[0].logits)),
            result[1],
        )
    )
    for decoder in (make(Preferring), hooked):
        with torch.no_grad():
            found = decoder.greedy(draw(N, S, 5), **arguments)
        assert found.symbols.tolist() == [[5, 5, 5]] * N
    assert make(Preferring).not_native_reasons() == ["the decoder is a Preferring"]


def test_the_backend_of_the_environment_counts_at_each_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = make()
    counted = []
    with torch.no_grad():
        decoder(symbols(), draw(N, S, 5))
        monkeypatch.setenv("FUSED_ATTN_BACKEND", "eager")
        real = decoder_steps.run
        monkeypatch.setattr(decoder_steps, "run", lambda *given: counted.append(1) or real(*given))
        decoder(symbols(), draw(N, S, 5))
    assert counted == [1] and os.environ["FUSED_ATTN_BACKEND"] == "eager"


@torch.no_grad()
def test_what_watches_operations_sees_them() -> None:
    decoder, memory, other = make(), draw(N, S, 5), symbols().flip(0)
    decoder(symbols(), memory)
    with FlopCounterMode(display=False) as counter:
        decoder(symbols(), memory)
    assert counter.get_total_flops() > 0
    traced = make_fx(lambda x: decoder(x, memory)[0].logits)(symbols())
    torch.testing.assert_close(traced(other), decoder(other, memory)[0].logits)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(memory, torch.ones_like(memory))
        logits = decoder(symbols(), dual)[0].logits
        assert forward_ad.unpack_dual(logits).tangent is not None


@torch.no_grad()
def test_autocast_keeps_calls_in_torch() -> None:
    decoder, memory = make(), draw(N, S, 5)
    decoder(symbols(), memory)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert decoder.not_native_reasons() == ["autocast is on"]
        assert decoder(symbols(), memory)[0].logits.dtype == torch.bfloat16
    check(decoder)


@torch.no_grad()
def test_the_products_of_all_steps_at_once_are_counted() -> None:
    """oneDNN's LSTM runs a sequence in one operator, for which a FLOP counter has no formula."""
    layers = RecurrentStack("lstm", 16, 16, 1)
    with FlopCounterMode(display=False) as counter:
        layers(draw(N, 5, 16), (torch.zeros(1, N, 16), torch.zeros(1, N, 16)))
    assert counter.get_total_flops() == 2 * N * 5 * (4 * 16) * (16 + 16)


@torch.no_grad()
def test_transforms_of_parameters() -> None:
    decoder, memory = make(), draw(N, S, 5)
    decoder(symbols(), memory)

    def total(weight: Tensor) -> Tensor:
        given = {"output_layer.weight": weight}
        logits: Tensor = functional_call(decoder, given, (symbols(), memory))[0].logits
        return logits.square().sum()

    weight = draw(V, 8)
    gradient = torch.func.grad(total)(weight)
    with torch.enable_grad():
        leaf = weight.clone().requires_grad_()
        total(leaf).backward()
    torch.testing.assert_close(gradient, leaf.grad)


def test_a_default_device_does_not_matter() -> None:
    decoder, memory = make(), draw(N, S, 5)
    with torch.no_grad():
        expected = decoder.greedy(memory, bos=1, eos=2, max_length=4)
        with torch.device("meta"):
            found = decoder.greedy(memory, bos=1, eos=2, max_length=4)
    assert torch.equal(found.symbols, expected.symbols)
    assert found.lengths.device.type == "cpu"


def test_memory_does_not_grow_with_max_length() -> None:
    decoder = make()
    with torch.no_grad():
        decoder.output_layer.bias[2] += 1e3  # ends at once
        found = decoder.greedy(draw(N, S, 5), bos=1, eos=2, max_length=2**40, return_weights=True)
    assert found.symbols.tolist() == [[2]] * N and found.weights.shape == (N, 1, S)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_long_call_can_be_interrupted(threads: int) -> None:
    decoder, memory = make(), draw(N, S, 5)
    inner: list[Tensor] = []

    def handle(*_: object) -> None:  # runs between two steps, and decodes too
        inner.append(decoder.greedy(memory, bos=1, eos=2, max_length=4).symbols)
        raise KeyboardInterrupt

    before, handler = torch.get_num_threads(), signal.signal(signal.SIGALRM, handle)
    try:
        torch.set_num_threads(threads)
        with torch.no_grad():
            decoder.output_layer.bias[2] -= 1e3  # never ends
            expected = decoder.greedy(memory, bos=1, eos=2, max_length=4).symbols
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            start = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                decoder.greedy(memory, bos=1, eos=2, max_length=2**23)
            assert time.monotonic() - start < 5.0
            again = decoder.greedy(memory, bos=1, eos=2, max_length=4).symbols
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        torch.set_num_threads(before)
    assert torch.equal(inner[0], expected) and torch.equal(again, expected)


ERRORS: dict[str, tuple[Callable[[LuongDecoder, Any, Any], Any], type[Exception], str]] = {
    "lengths of a prepared memory": (
        lambda decoder, x, m: decoder(
            x, decoder.attention.prepare_memory(m), torch.tensor([1] * N)
        ),
        ValueError,
        "memory_lengths and memory_mask must be None",
    ),
    "greedy with them": (
        lambda decoder, x, m: decoder.greedy(
            decoder.attention.prepare_memory(m), torch.tensor([1] * N), bos=1, eos=2, max_length=3
        ),
        ValueError,
        "memory_lengths and memory_mask must be None",
    ),
    "a memory of another score": (
        lambda decoder, x, m: decoder(
            x,
            make(attention={"score": "concat", "memory_dim": 5}).attention.prepare_memory(m),
        ),
        ValueError,
        "memory was prepared for the score 'concat'",
    ),
    "a position that is none": (
        lambda decoder, x, m: decoder(
            x, m, state=DecoderState((torch.zeros(1, N, 16),) * 2, position=1.5)
        ),
        TypeError,
        "state.position must be an int",
    ),
}


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_the_same_in_torch(name: str, backend: str) -> None:
    call, error, message = ERRORS[name]
    with torch.no_grad(), pytest.raises(error, match=message):
        call(make(backend=backend), symbols(), draw(N, S, 5))
