"""The operators under opcheck, fake tensors, make_fx, torch.compile and torch.export."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from targets import Target, every_target
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from fused_attn import LuongAttention, autograd, functional
from fused_attn.prepared import exponentials
from fused_attn.testing import Case, make_inputs

NAMES = (
    "dot_attention",
    "dot_attention_backward",
    "concat_attention",
    "concat_attention_backward",
)
SCORES = ("dot", "general", "concat")
LAYOUTS = ("contiguous", "transposed", "sliced", "expanded")
MASKED = {
    "whole": {},
    "masked": {"lengths": True, "mask": "cube", "keep": True},
    "windowed": {"lengths": True, "window": "gaussian"},
}


def op(name: str) -> Any:
    return getattr(torch.ops.fused_attn, name).default


def operands(
    name: str,
    backend: str = "eager",
    prepared: bool = False,
    return_weights: bool = True,
    return_logsumexp: bool = True,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    device: str = "cpu",
    masked: str = "masked",
    seeds: tuple[bool, bool] = (True, True),
) -> tuple[Any, ...]:
    """Arguments of an operator; those of a backward include what its forward saved."""
    score = "dot" if name.startswith("dot") else "projected"
    case = Case(score, dtype, layout=layout, weights=True, attn_dim=8, **MASKED[masked])
    inputs = make_inputs(case, device=device)
    tensors, masking = inputs.tensors, inputs.masking
    if score == "dot":
        arguments, scale = (tensors["query"], tensors["memory"]), (inputs.scale,)
    else:
        exp = exponentials(tensors["memory_proj"]) if prepared else None
        arguments = (tensors["query_proj"], tensors["memory_proj"], exp)
        arguments, scale = (*arguments, tensors["v"], tensors["memory"]), ()
    positions, options = masking[:2], (*scale, *masking[2:4], backend, *(masking.window or ()))
    if not name.endswith("backward"):
        return (*arguments, *positions, return_weights, return_logsumexp, *options)
    forward = (*arguments, *positions, return_weights, True, *options)
    saved = op(name.removesuffix("_backward"))(*forward)
    grads = (inputs.grad_context, inputs.grad_weights)
    grads = tuple(grad if given else None for grad, given in zip(grads, seeds, strict=True))
    wanted = [True] * (3 if score == "dot" else 5)
    return (*grads, None, *arguments, *saved, wanted, *positions, *options)


@every_target
@pytest.mark.parametrize("masked", MASKED)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, masked: str, target: Target) -> None:
    """On inputs without requires_grad: the autograd Function is around the operator, not in it."""
    with target.active():
        arguments = operands(name, target.backend, device=target.device, masked=masked)
        torch.library.opcheck(op(name), arguments)


def metadata(results: tuple[Tensor | None, ...]) -> list[tuple[Any, ...] | None]:
    return [
        None if r is None else (tuple(r.shape), r.dtype, r.device.type, r.stride()) for r in results
    ]


def assert_fake_is_real(name: str, arguments: tuple[Any, ...]) -> None:
    real = op(name)(*arguments)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
        fake = op(name)(*fakes)
    assert metadata(fake) == metadata(real)
    assert all(result is None or result.is_contiguous() for result in real)


@every_target
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_fake_is_what_comes_out(name: str, dtype: torch.dtype, layout: str, target: Target) -> None:
    where = {"backend": target.backend, "device": target.device}
    with target.active():
        assert_fake_is_real(name, operands(name, dtype=dtype, layout=layout, **where))


@every_target
@pytest.mark.parametrize("return_weights", [False, True], ids=["no_weights", "weights"])
@pytest.mark.parametrize("prepared", [False, True], ids=["", "prepared"])
@pytest.mark.parametrize("masked", MASKED)
@pytest.mark.parametrize("seeds", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("name", ["dot_attention", "concat_attention"])
def test_fake_is_what_comes_out_for_all_flags(
    name: str,
    seeds: tuple[bool, bool],
    masked: str,
    prepared: bool,
    return_weights: bool,
    target: Target,
) -> None:
    flags = {"masked": masked, "prepared": prepared, "device": target.device}
    with target.active():
        forward = operands(name, target.backend, return_weights=return_weights, **flags)
        assert_fake_is_real(name, forward)
        # A gradient of the weights needs the saved weights; a gradient of the context does not.
        if return_weights or not seeds[1]:
            backward = operands(
                f"{name}_backward", target.backend, return_weights=return_weights, seeds=seeds,
                **flags,
            )  # fmt: skip
            assert_fake_is_real(f"{name}_backward", backward)


@every_target
@pytest.mark.parametrize("name", ["dot_attention", "concat_attention"])
def test_results_not_asked_for_are_none(name: str, target: Target) -> None:
    where = {"backend": target.backend, "device": target.device}
    with target.active():
        whole = op(name)(*operands(name, **where))
        for flags in ((False, False), (True, False), (False, True)):
            wanted = dict(zip(("return_weights", "return_logsumexp"), flags, strict=True))
            arguments = operands(name, **where, **wanted)
            assert_fake_is_real(name, arguments)
            results = zip(op(name)(*arguments), whole, (True, *flags), strict=True)
            for got, expected, asked in results:
                if asked:  # without weights another kernel may run, with other rounding
                    torch.testing.assert_close(got, expected)
                else:
                    assert got is None


@every_target
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8], ids=str)
@pytest.mark.parametrize("bad", [-1, 10])
def test_operators_refuse_a_length_out_of_range(
    bad: int, dtype: torch.dtype, target: Target
) -> None:
    if target.backend == "cuda":
        pytest.skip("lengths stay on the GPU, where kernels clamp them")
    query, memory, *_ = operands("dot_attention", device=target.device)
    lengths = torch.tensor([1, 2, bad], dtype=dtype)
    with (
        target.active(),
        pytest.raises(ValueError, match=rf"memory_lengths must lie in 0\.\.9 .* got {bad}"),
    ):
        masking = (lengths, None, None, 1.0, None)
        autograd.dot_attention(query, memory, 1.0, masking, False, target.backend)


def module_and_inputs(score: str, source: int = 7) -> tuple[LuongAttention, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    query_dim = 12 if score == "dot" else 8
    module = LuongAttention(query_dim, 12, score, output_dim=6)
    lengths = torch.tensor([source, 0, 3])
    query, memory = torch.randn(3, 4, query_dim), torch.randn(3, source, 12)
    return module, (query.requires_grad_(), memory.requires_grad_(), lengths)


def step(module: Any, inputs: tuple[Tensor, ...], parameters: list[Tensor]) -> list[Tensor]:
    """Results, and gradients of inputs and parameters for a loss on both results."""
    state, weights = module(*inputs)
    loss = state.square().sum() + weights.square().sum()
    return [state, weights, *torch.autograd.grad(loss, [*inputs[:2], *parameters])]


def assert_compiled_is_eager(compiled: Any, module: LuongAttention, source: int) -> None:
    _, inputs = module_and_inputs(module.score, source)
    parameters = list(module.parameters())
    expected = step(module, inputs, parameters)
    for got, wanted in zip(step(compiled, inputs, parameters), expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiles(test: Any) -> Any:
    """Start from an empty compiler cache, and ignore torch's warning about its own tracing."""
    own_way = "ignore:.*should not be instantiated:DeprecationWarning"
    return pytest.mark.usefixtures("_fresh_compiler")(pytest.mark.filterwarnings(own_way)(test))


@compiles
@pytest.mark.parametrize("score", SCORES)
def test_compiled_without_a_break(score: str) -> None:
    """Forward and backward. The second source length triggers one recompile, for all lengths."""
    module, _ = module_and_inputs(score)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for source in (7, 11, 19, 5):
        assert_compiled_is_eager(compiled, module, source)
    assert counter.frame_count == 2


@compiles
@pytest.mark.parametrize("score", SCORES)
def test_compiled_without_weights(score: str) -> None:
    """In a trace, weights that were not requested get a gradient of size 0."""
    module, (query, memory, lengths) = module_and_inputs(score)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    leaves = (query, memory, *module.parameters())
    found = []
    for call in (module, compiled):
        state, weights = call(query, memory, lengths, return_weights=False)
        assert weights is None
        found.append([state, *torch.autograd.grad(state.square().sum(), leaves)])
    torch.testing.assert_close(*found)


@compiles
@pytest.mark.parametrize("score", SCORES)
def test_compiled_once_for_every_source_length(score: str) -> None:
    module, _ = module_and_inputs(score)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    assert_compiled_is_eager(compiled, module, 7)
    first = counter.frame_count
    for source in (11, 19, 5):
        assert_compiled_is_eager(compiled, module, source)
    assert counter.frame_count == first


@compiles
def test_compiled_decoding_over_a_prepared_memory() -> None:
    module, (query, memory, lengths) = module_and_inputs("concat")

    def decode(query: Tensor, memory: Tensor, lengths: Tensor) -> Tensor:
        prepared = module.prepare_memory(memory, lengths)
        states = [module(query[:, t], prepared)[0] for t in range(query.shape[1])]
        return torch.stack(states, dim=1)

    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    expected = decode(query, memory, lengths)
    got = compiled(query, memory, lengths)
    torch.testing.assert_close(got, expected)
    for gradient, wanted in zip(
        torch.autograd.grad(got.sum(), (query, memory)),
        torch.autograd.grad(expected.sum(), (query, memory)),
        strict=True,
    ):
        torch.testing.assert_close(gradient, wanted)


@compiles
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what inductor itself imports
def test_compiled_by_inductor() -> None:
    """Only the operator and matrix products: anything else would run the C++ compiler."""
    module, (query, memory, lengths) = module_and_inputs("general")
    weight, after = module.query_proj.weight, module.output_proj.weight[:, :12].detach().T

    def attend(query: Tensor, memory: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        rest = {"memory_lengths": lengths, "return_weights": True}
        context, weights = functional.general_attention(query, memory, weight.T, **rest)
        return context @ after, weights

    leaves = (query, memory, weight)
    found = []
    for call in (attend, torch.compile(attend, fullgraph=True)):
        results = call(*leaves)
        seeds = [torch.linspace(-1, 1, result.numel()).view_as(result) for result in results]
        found.append([*results, *torch.autograd.grad(results, leaves, seeds)])
    torch.testing.assert_close(*found)


@compiles
@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
@pytest.mark.parametrize("score", SCORES)
def test_export_keeps_the_operator(score: str, strict: bool) -> None:
    """Saved, loaded, and run with other source lengths than in the export."""
    module, (query, memory, lengths) = module_and_inputs(score)
    source = torch.export.Dim("source", min=2, max=100)
    shapes = ({}, {1: source}, {})
    inputs = (query.detach(), memory.detach(), lengths)
    exported = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=strict)
    # Strict export puts the content of an autograd.Function into a separate graph.
    graphs = [m.graph for m in exported.graph_module.modules() if isinstance(m, GraphModule)]
    calls = [node.target for graph in graphs for node in graph.nodes]
    wanted = "concat_attention" if score == "concat" else "dot_attention"
    assert calls.count(op(wanted)) == 1
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for source_length in (7, 13):
        _, inputs = module_and_inputs(score, source_length)
        for got, expected in zip(loaded(*inputs), module(*inputs), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", NAMES)
def test_make_fx_traces_one_operator(name: str) -> None:
    arguments = operands(name)
    traced = make_fx(lambda *rest: op(name)(*rest), tracing_mode="symbolic")(*arguments)
    calls = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert calls.count(op(name)) == 1
    for got, expected in zip(traced(*arguments), op(name)(*arguments), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("score", SCORES)
def test_fake_tensors_pass_through_the_module(score: str) -> None:
    """Forward and backward without data: native code gets no addresses."""
    with FakeTensorMode():
        module, inputs = module_and_inputs(score)
        results = step(module, inputs, list(module.parameters()))
    expected = step(*module_and_inputs(score), [])
    assert [r.shape for r in results[:4]] == [e.shape for e in expected]


def test_the_meta_device_gives_shapes() -> None:
    query, memory = torch.ones(2, 3, 8, device="meta"), torch.ones(2, 5, 8, device="meta")
    context, weights = functional.dot_attention(query, memory, return_weights=True)
    assert (context.shape, weights.shape) == ((2, 3, 8), (2, 3, 5))
    assert context.device.type == "meta"


def test_no_autograd_function_where_no_gradient_is_wanted() -> None:
    query, memory = torch.ones(2, 3, 8, requires_grad=True), torch.ones(2, 5, 8)
    assert functional.dot_attention(query, memory)[0].grad_fn is not None
    with torch.no_grad():
        assert functional.dot_attention(query, memory)[0].grad_fn is None
    assert functional.dot_attention(query.detach(), memory)[0].grad_fn is None


def test_backward_frees_what_was_saved() -> None:
    query, memory = torch.ones(2, 3, 8, requires_grad=True), torch.ones(2, 5, 8)
    context, _ = functional.dot_attention(query, memory)
    context.sum().backward()
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        context.sum().backward()


def test_a_change_in_place_before_backward_is_noticed() -> None:
    query, memory = torch.ones(2, 3, 8, requires_grad=True), torch.ones(2, 5, 8)
    context, _ = functional.dot_attention(query, memory)
    memory.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        context.sum().backward()
