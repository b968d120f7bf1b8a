"""A step of a recurrent layer on a CPU: it equals the sequence call, and never makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune, weight_norm

from fused_attn.seq2seq.config import ModelConfig, SearchConfig
from fused_attn.seq2seq.model.one_step import one_step
from fused_attn.seq2seq.model.recurrent import CELLS, Stack
from fused_attn.testing import check_within_budget

N, T, WIDTH = 3, 5, 8
PARTS = {"lstm": 2, "gru": 1, "rnn": 1}


def make_stack(cell: str, layers: int = 2, **options: Any) -> Stack:
    torch.manual_seed(0)
    return Stack(ModelConfig(cell=cell, dropout=0.0, **options), WIDTH, WIDTH, layers)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype)


@contextmanager
def counted_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The classes of the recurrent layers that are called inside."""
    calls: list[str] = []
    with monkeypatch.context() as patch:
        for kind in CELLS.values():

            def forward(layer: Any, *args: Any, run: Any = kind.forward, **rest: Any) -> Any:
                calls.append(type(layer).__name__)
                return run(layer, *args, **rest)

            patch.setattr(kind, "forward", forward)
        yield calls


def by_steps(stack: Stack, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    outputs = []
    for t in range(x.shape[1]):
        y, state = stack(x[:, t : t + 1], state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def results(run: Callable[..., Any], stack: Stack, x: Tensor, state: Any) -> dict[str, Tensor]:
    """Outputs, last state and all gradients, by name."""
    x, state = x.clone().requires_grad_(), [t.clone().requires_grad_() for t in state]
    outputs, final = run(stack, x, tuple(state))
    loss = outputs.double().square().sum() + sum(t.double().sin().sum() for t in final)
    sources = {"x": x, **{f"state {n}": t for n, t in enumerate(state)}}
    sources |= dict(stack.named_parameters())
    gradients = torch.autograd.grad(loss, list(sources.values()))
    found = {"outputs": outputs.detach()} | {f"final {n}": t.detach() for n, t in enumerate(final)}
    return found | {f"grad {name}": g for name, g in zip(sources, gradients, strict=True)}


@pytest.mark.parametrize("is_mixed", [False, True], ids=["float32", "bf16 autocast"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_steps_equal_the_sequence(cell: str, layers: int, residual: bool, is_mixed: bool) -> None:
    """Results and gradients, against the layers' own call for all steps, in float64."""
    stack = make_stack(cell, layers, residual=residual)
    x, state = draw(N, T, WIDTH), [draw(layers, N, WIDTH) for _ in range(PARTS[cell])]
    whole = make_stack(cell, layers, residual=residual).double()
    sequence = lambda stack, x, state: stack(x, state)  # noqa: E731
    oracle = results(sequence, whole, x.double(), [t.double() for t in state])
    with torch.autocast("cpu", torch.bfloat16) if is_mixed else nullcontext():
        plain = results(sequence, stack, x, state)
        found = results(by_steps, stack, x, state)
    for name, tensor in found.items():
        assert tensor.dtype == plain[name].dtype, name
        if is_mixed:  # each step rounds its state, and the gradients of T steps are rounded
            error = (tensor.double() - oracle[name]).abs().max()
            assert error <= 4 * 2**-8 * (1 + oracle[name].abs().max()), name
        else:
            check_within_budget(name, tensor, oracle[name], plain[name])


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_a_step_never_calls_the_layers(
    cell: str, grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = make_stack(cell)
    with counted_calls(monkeypatch) as calls, torch.set_grad_enabled(grad):
        stack(draw(N, 1, WIDTH))
        _, state = stack(draw(N, 1, WIDTH), tuple(draw(2, N, WIDTH) for _ in range(PARTS[cell])))
        stack(draw(0, 1, WIDTH), tuple(t[:, :0] for t in state))
        assert not calls
        stack(draw(N, 2, WIDTH), state)
        assert calls == [CELLS[cell].__name__] * 2


@pytest.mark.parametrize("rows", [N, 0])
@pytest.mark.parametrize("cell", CELLS)
def test_a_step_in_both_directions(cell: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources of one symbol, read from both ends; also a batch without rows."""
    stack = Stack(ModelConfig(cell=cell, dropout=0.0), WIDTH, 6, 2, bidirectional=True).double()
    x = draw(rows, 1, WIDTH, dtype=torch.float64)
    with counted_calls(monkeypatch) as calls:
        y, final = stack(x)
        assert not calls
    expected, expected_final = x, []
    for layer in stack.layers:
        expected, after = layer(expected)
        tensors = after if isinstance(after, tuple) else (after,)
        expected_final.append([torch.cat(list(t), dim=-1) for t in tensors])
    torch.testing.assert_close(y, expected)
    for found, each in zip(final, zip(*expected_final, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(each))


class Counted(nn.LSTM):
    """A subclass may compute something else."""

    def forward(self, *args: Any) -> Any:
        y, state = super().forward(*args)
        return 2.0 * y, state


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2.0 * weight


class Adapter(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        y, state = self.inner(*args)
        return y + 1.0, state


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda _, args, result: (result[0] + 1.0, result[1]))
    return layer


def replaced_forward(layer: Any) -> nn.Module:
    run = layer.forward
    layer.forward = lambda *args: (run(*args)[0] + 1.0, run(*args)[1])
    return layer


def parametrized(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight_hh_l0", Doubled())
    return layer


def pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight_hh_l0", amount=0.5)


def quantised(layer: nn.Module) -> nn.Module:
    holder = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.LSTM}, torch.qint8)
    return holder[0]


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "hook": hooked,
    "forward of its own": replaced_forward,
    "parametrized": parametrized,
    "pruned": pruned,
    "weight norm": lambda layer: weight_norm(layer, "weight_hh_l0"),
    "quantised": quantised,
    "wrapped": Adapter,
    "subclass": lambda _: Counted(WIDTH, WIDTH, batch_first=True),
    "no bias": lambda _: nn.LSTM(WIDTH, WIDTH, batch_first=True, bias=False),
    "two layers": lambda _: nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True),
    "projection": lambda _: nn.LSTM(WIDTH, WIDTH, batch_first=True, proj_size=3),
}


@pytest.mark.filterwarnings("ignore")  # weight_norm and quantize_dynamic are deprecated
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_changed_layer_is_called(name: str) -> None:
    """Its result is that of its own call, whatever it holds."""
    torch.manual_seed(0)
    layer = WRAPPERS[name](nn.LSTM(WIDTH, WIDTH, batch_first=True))
    x = draw(N, 1, WIDTH)
    assert one_step(layer, x, None) is None
    stack = make_stack("lstm", 1)
    if name not in ("two layers", "projection"):  # those have another state
        stack.layers[0] = layer
        state = (draw(1, N, WIDTH), draw(1, N, WIDTH))
        expected, (hidden, cells) = layer(x, state)
        found, final = stack(x, state)
        assert torch.equal(found, expected)
        assert torch.equal(final[0], hidden) and torch.equal(final[1], cells)


def test_a_relu_layer_is_called() -> None:
    layer = nn.RNN(WIDTH, WIDTH, batch_first=True, nonlinearity="relu")
    assert one_step(layer, draw(N, 1, WIDTH), None) is None


def test_hooks_see_the_same_calls_as_before() -> None:
    """A hook of one layer gets its tensors; a global hook gets every layer's."""
    stack, seen = make_stack("gru"), []
    stack.layers[1].register_forward_pre_hook(lambda layer, args: seen.append(args[0].shape))
    stack(draw(N, 1, WIDTH))
    assert seen == [(N, 1, WIDTH)]
    names: list[str] = []
    handle = register_module_forward_hook(lambda layer, *_: names.append(type(layer).__name__))
    try:
        make_stack("lstm")(draw(N, 1, WIDTH))
    finally:
        handle.remove()
    assert names.count("LSTM") == 2


def test_weights_passed_to_functional_call_are_used() -> None:
    stack = make_stack("lstm", 1)
    x, zeros = draw(N, 1, WIDTH), {n: torch.zeros_like(p) for n, p in stack.named_parameters()}
    found, _ = torch.func.functional_call(stack, zeros, (x,))
    assert torch.equal(found, torch.zeros(N, 1, WIDTH)) and not torch.equal(stack(x)[0], found)


class OneStep(nn.Module):
    """A stack whose state is an argument, as graphs want it."""

    def __init__(self, cell: str) -> None:
        super().__init__()
        self.stack = make_stack(cell)

    def forward(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        y, final = self.stack(x, state)
        return (y, *final)


@pytest.mark.filterwarnings("ignore")  # the tracer warns about sizes
@pytest.mark.parametrize("cell", CELLS)
def test_traced_graphs_keep_the_layer(cell: str) -> None:
    """`torch.export` and `torch.jit.trace`, by which ONNX gets its LSTM nodes."""
    model, parts = OneStep(cell), PARTS[cell]
    arguments = (draw(N, 1, WIDTH), *(draw(2, N, WIDTH) for _ in range(parts)))
    name = {"lstm": "lstm", "gru": "gru", "rnn": "rnn_tanh"}[cell]
    exported = torch.export.export(model, arguments)
    targets = [str(node.target) for node in exported.graph.nodes]
    assert targets.count(f"aten.{name}.input") == 2
    traced = torch.jit.trace(model, arguments)
    kinds = [node.kind() for node in traced.inlined_graph.nodes()]
    assert kinds.count(f"aten::{name}") == 2
    for graph in (exported.module(), traced):
        for found, expected in zip(graph(*arguments), model(*arguments), strict=True):
            torch.testing.assert_close(found, expected)


def test_other_devices_call_the_layer() -> None:
    layer = nn.LSTM(WIDTH, WIDTH, batch_first=True, device="meta")
    assert one_step(layer, torch.empty(N, 1, WIDTH, device="meta"), None) is None


def test_a_wrong_width_or_state_is_refused() -> None:
    stack = make_stack("lstm", 1)
    with pytest.raises(RuntimeError):
        stack(draw(N, 1, WIDTH + 1))
    with pytest.raises(RuntimeError):
        stack(draw(N, 1, WIDTH), (draw(1, N, WIDTH), draw(1, N + 1, WIDTH)))


def test_a_search_and_training_with_input_feeding_take_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only the encoder calls its layers, once each."""
    from fused_attn.seq2seq.model.seq2seq import Seq2Seq
    from fused_attn.seq2seq.search.search import search

    config = ModelConfig(hidden=WIDTH, embedding=WIDTH, input_feeding=True, layers=1)
    model = Seq2Seq(config, 11, 11)
    source, lengths = torch.full((2, 4), 5), torch.tensor([4, 4])
    with counted_calls(monkeypatch) as calls:
        search([model.eval()], source, lengths, SearchConfig(beam=2, max_length=4))
        assert len(calls) == model.config.encoder_depth
        calls.clear()
        model.train().loss(source, lengths, torch.full((2, 4), 5)).backward()
        assert len(calls) == model.config.encoder_depth
