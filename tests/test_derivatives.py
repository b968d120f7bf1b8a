"""Operators called by name have derivatives, in every kind of graph that holds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from targets import Target, every_target
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from fused_attn import LuongAttention, autograd, concat_attention, dot_attention, ops, testing
from fused_attn.testing import Case

Call = Callable[..., Any]
OPERATORS = ("dot_attention", "concat_attention", "concat_scores")


def op(name: str) -> Any:
    return getattr(torch.ops.fused_attn, name).default


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def inputs_of(name: str) -> tuple[Tensor, ...]:
    """Differentiable inputs: B = 2, T = 3, S = 5, E = 4, A = 6."""
    if name == "dot_attention":
        return draw(2, 3, 4), draw(2, 5, 4, seed=1)
    projections = (draw(2, 3, 6), draw(2, 5, 6, seed=1), draw(6, seed=2))
    return projections if name == "concat_scores" else (*projections, draw(2, 5, 4, seed=3))


def raw(name: str, lengths: Tensor | None = None, backend: str = "auto") -> Call:
    """The operator as a function of its differentiable inputs. Returns all of its results."""

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        if name == "dot_attention":
            return op(name)(*inputs, lengths, None, True, True, 0.7, None, 1.0, backend)
        query, proj, v, *memory = inputs
        if name == "concat_scores":
            return (op(name)(query, proj, None, v, lengths, None, backend),)
        rest = (lengths, None, True, True, None, 1.0, backend)
        return op(name)(query, proj, None, v, *memory, *rest)

    return call


def chain(name: str, lengths: Tensor | None = None) -> Call:
    """The same in plain torch, for rows that are not fully masked."""

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        query, keys, *rest = inputs
        if name == "dot_attention":
            scores, memory = 0.7 * query @ keys.mT, keys
        else:
            scores, memory = torch.tanh(query[:, :, None] + keys[:, None]) @ rest[0], rest[-1]
        if lengths is not None:
            hidden = torch.arange(scores.shape[2]) >= lengths[:, None, None]
            scores = scores.masked_fill(hidden, -torch.inf)
        if name == "concat_scores":
            return (scores,)
        weights = scores.softmax(dim=-1)
        return weights @ memory, weights, scores.logsumexp(dim=-1)

    return call


def loss(results: tuple[Tensor, ...]) -> Tensor:
    """A loss on all finite numbers in the results."""
    return sum(torch.where(r.isfinite(), r, 0.0).sin().sum() for r in results)


def gradients(call: Call, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return list(torch.autograd.grad(loss(call(*inputs)), inputs, materialize_grads=True))


LENGTHS = torch.tensor([5, 3])


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "lengths"])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_raw_operator_has_its_gradients(name: str, lengths: Tensor | None, backend: str) -> None:
    """With a loss on context, weights and log-sum-exp together, and on each alone."""
    inputs = inputs_of(name)
    expected = gradients(chain(name, lengths), inputs)
    torch.testing.assert_close(gradients(raw(name, lengths, backend), inputs), expected)
    results = raw(name, lengths, backend)(*inputs)
    for which in range(len(results)):
        alone = gradients(lambda *x, i=which: (chain(name, lengths)(*x)[i],), inputs)
        got = gradients(lambda *x, i=which: (raw(name, lengths, backend)(*x)[i],), inputs)
        torch.testing.assert_close(got, alone)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_raw_operator_is_differentiable_twice_and_forward(name: str) -> None:
    inputs = inputs_of(name)
    assert torch.autograd.gradcheck(raw(name), inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(raw(name), inputs)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_raw_operator_under_torch_func(name: str) -> None:
    inputs = tuple(tensor.detach() for tensor in inputs_of(name))
    places = tuple(range(len(inputs)))

    def of(call: Call) -> Any:
        grad = torch.func.grad(lambda *x: loss(call(*x)), argnums=places)(*inputs)
        tangents = tuple(torch.ones_like(tensor) for tensor in inputs)
        _, pushed = torch.func.jvp(lambda *x: loss(call(*x)), inputs, tangents)
        return grad, pushed

    torch.testing.assert_close(of(raw(name)), of(chain(name)))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("name", OPERATORS)
def test_a_traced_operator_trains(name: str) -> None:
    """In a graph of make_fx, traced on inputs with or without requires_grad."""
    inputs = inputs_of(name)
    expected = gradients(chain(name), inputs)
    for traced_on in (inputs, tuple(tensor.detach() for tensor in inputs)):
        graph = make_fx(raw(name))(*traced_on)
        torch.testing.assert_close(gradients(graph, inputs), expected)


LAYERS: dict[str, dict[str, Any]] = {
    "dot": {"score": "dot"},
    "general": {"score": "general"},
    "concat": {"score": "concat"},
    "location": {"score": "location", "max_source": 9},
    "predictive": {"score": "dot", "local": "predictive", "window": 2},
    "coverage": {"score": "concat", "weight_norm": True, "layer_norm": True},
}


def layer_and_inputs(kind: str) -> tuple[LuongAttention, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    layer = LuongAttention(4, output_dim=3, dtype=torch.float64, **LAYERS[kind])
    return layer, (draw(2, 3, 4), draw(2, 5, 4, seed=1), LENGTHS)


def trained(call: Call, inputs: tuple[Tensor, ...], parameters: list[Tensor]) -> list[Tensor]:
    state, weights = call(*inputs)
    total = state.square().sum() + weights.square().sum()
    return list(torch.autograd.grad(total, [*inputs[:2], *parameters]))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # the same
@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
@pytest.mark.parametrize("kind", LAYERS)
def test_an_exported_layer_trains(kind: str, strict: bool) -> None:
    """As exported, and decomposed into core operators."""
    layer, inputs = layer_and_inputs(kind)
    expected = trained(layer, inputs, list(layer.parameters()))
    detached = tuple(tensor.detach() for tensor in inputs)
    exported = torch.export.export(layer, detached, strict=strict)
    for program in (exported, exported.run_decompositions()):
        module = program.module()
        parameters = dict(module.named_parameters())
        ordered = [parameters[name] for name, _ in layer.named_parameters()]
        torch.testing.assert_close(trained(module, inputs, ordered), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit's own, from 2.12 on
@pytest.mark.filterwarnings("ignore::FutureWarning")  # the same, from 2.14 on
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # at every comparison of sizes
@pytest.mark.parametrize("kind", ["dot", "general", "concat"])
def test_a_layer_in_torchscript_trains(kind: str) -> None:
    """With other lengths and source lengths than in the trace."""
    layer, inputs = layer_and_inputs(kind)
    traced = torch.jit.trace(layer, inputs, check_trace=False)
    others = (draw(2, 2, 4, seed=5), draw(2, 7, 4, seed=6), torch.tensor([2, 7]))
    for given in (inputs, others):
        expected = trained(layer, given, list(layer.parameters()))
        torch.testing.assert_close(trained(traced, given, list(traced.parameters())), expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("kind", ["dot", "concat"])
def test_a_transform_inside_a_compiled_function(kind: str) -> None:
    layer, (query, memory, lengths) = layer_and_inputs(kind)
    parameters = dict(layer.named_parameters())

    def of(parameters: dict[str, Tensor], query: Tensor) -> Tensor:
        state, _ = torch.func.functional_call(layer, parameters, (query, memory, lengths))
        return state.square().sum()

    def both(query: Tensor) -> Any:
        tangents = (torch.ones_like(query),)
        _, pushed = torch.func.jvp(lambda q: of(parameters, q), (query,), tangents)
        return torch.func.grad(of, argnums=(0, 1))(parameters, query), pushed

    torch._dynamo.reset()
    expected = both(query.detach())
    got = torch.compile(both, fullgraph=True, backend="aot_eager")(query.detach())
    torch.testing.assert_close(got, expected)
    assert all(gradient.any() for gradient in (*expected[0][0].values(), expected[0][1]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what inductor itself imports
@pytest.mark.filterwarnings("ignore::UserWarning")  # the same
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own
@pytest.mark.parametrize("kind", ["dot", "concat"])
def test_a_layer_compiled_ahead_of_time(kind: str, tmp_path: Any) -> None:
    """With AOTInductor, into a package that is saved and loaded."""
    layer, inputs = layer_and_inputs(kind)
    detached = tuple(tensor.detach() for tensor in inputs)
    with torch.no_grad():
        exported = torch.export.export(layer, detached)
        path = torch._inductor.aoti_compile_and_package(
            exported, package_path=str(tmp_path / "layer.pt2")
        )
        loaded = torch._inductor.aoti_load_package(path)
        torch.testing.assert_close(loaded(*detached), layer(*detached))


@every_target
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("score", ["dot", "projected"])
def test_only_what_is_needed_is_computed(score: str, masked: bool, target: Target) -> None:
    """For each subset of inputs: their gradients are the same as for all, the others are None."""
    options = {"lengths": True, "mask": "cube", "keep": True} if masked else {}
    few = target.is_interpreted
    sizes = {"batch": 2, "queries": 3 if few else 11, "source": 20 if few else 70}
    case = Case(score, torch.float32, memory_dim=32, attn_dim=24, **sizes, **options)
    inputs = target.inputs(case)
    names = ["query", "memory"]
    if score == "projected":
        names = ["query_proj", "memory_proj", "v", "memory"]
    operator = autograd.DOT if score == "dot" else autograd.CONCAT
    tensors = [inputs.tensors[name] for name in names]
    lengths, mask, keep, keep_scale, _ = inputs.masking
    operands = list(tensors) if score == "dot" else [*tensors[:2], None, *tensors[2:]]
    scale = [inputs.scale] if score == "dot" else []
    forward = [*operands, lengths, mask, True, True, *scale, keep, keep_scale, target.backend]
    with target.active(), testing.poisoned_empty():
        saved = operator.run(*forward)
        grad_outputs = (inputs.grad_context, inputs.grad_weights, None)
        rest = [lengths, mask, *scale, keep, keep_scale, target.backend]

        def backward(wanted: list[bool]) -> tuple[Tensor | None, ...]:
            return operator.run_backward(*grad_outputs, *operands, *saved, wanted, *rest)

        whole = backward([True] * len(names) + [False])
        for bits in range(1, 2 ** len(names)):
            wanted = [bool(bits >> i & 1) for i in range(len(names))]
            for name, got, right, asked in zip(
                names, backward([*wanted, False]), whole, wanted, strict=False
            ):
                assert (got is None) != asked, (name, wanted)
                if asked:  # a loop that sums fewer terms may be contracted to FMAs differently
                    torch.testing.assert_close(got, right)


@pytest.mark.parametrize("score", ["dot", "general", "concat"])
def test_a_frozen_memory_costs_no_gradient(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the gradients that are needed are requested from the operators."""
    asked: list[list[bool]] = []
    name = "dot" if score in ("dot", "general") else "concat"
    operator = autograd.DOT if name == "dot" else autograd.CONCAT
    place = [a.name for a in operator.backward._schema.arguments].index("wanted")

    def watched(*arguments: Any) -> Any:
        asked.append(arguments[place])
        return operator.run_backward(*arguments)

    constant = "DOT" if name == "dot" else "CONCAT"
    monkeypatch.setattr(autograd, constant, operator._replace(run_backward=watched))
    layer = LuongAttention(8, score=score)
    query, memory = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 5, 8)
    layer(query, memory)[0].sum().backward()
    frozen = [True, False, False] if name == "dot" else [True, True, True, False, False]
    assert asked == [frozen]
    if score == "concat":
        asked.clear()
        layer.query_proj.requires_grad_(False)
        layer.memory_proj.requires_grad_(False)
        layer(query.detach(), memory)[0].sum().backward()
        assert asked == [[False, False, True, False, False]]


@pytest.mark.parametrize("score", ["dot", "concat"])
def test_masks_may_change_between_a_forward_and_its_backward(score: str) -> None:
    layer = LuongAttention(8, score=score, dtype=torch.float64)
    query, memory = draw(2, 3, 8), draw(2, 5, 8, seed=1)

    def gradient(change: bool) -> list[Tensor]:
        lengths, mask = torch.tensor([5, 3]), torch.ones(2, 5, dtype=torch.bool)
        result, _ = layer(query, memory, lengths, mask)
        if change:
            lengths.fill_(1)
            mask.zero_()
        return list(torch.autograd.grad(result.square().sum(), (query, memory)))

    for got, expected in zip(gradient(True), gradient(False), strict=True):
        assert torch.equal(got, expected)


def test_lengths_of_inference_mode_serve_a_training() -> None:
    with torch.inference_mode():
        lengths, mask = torch.tensor([5, 3]), torch.ones(2, 5, dtype=torch.bool)
    query, memory = draw(2, 3, 8), draw(2, 5, 8, seed=1)
    dot_attention(query, memory, memory_lengths=lengths, memory_mask=mask)[0].sum().backward()
    assert query.grad is not None and query.grad[1].any()


@every_target
@pytest.mark.parametrize("how", ["source", "lengths", "shared", "cube"])
@pytest.mark.parametrize("score", ["dot", "concat"])
def test_one_position_has_no_gradient_of_its_score(score: str, how: str, target: Target) -> None:
    """Its weight is 1 for any score, so the gradient must be exactly 0, without rounding errors."""
    source = 1 if how == "source" else 19
    case = Case(
        score, torch.float32, batch=2, queries=13, source=source, memory_dim=48, attn_dim=40
    )
    inputs = target.inputs(case)
    masks: dict[str, Tensor] = {}
    chosen = torch.zeros(2, inputs.tensors["memory"].shape[1], dtype=torch.bool)
    chosen[:, -2:-1] = True
    if how == "lengths":
        masks["memory_lengths"] = torch.ones(2, dtype=torch.int64)
    elif how == "shared":
        masks["memory_mask"] = chosen
    elif how == "cube":
        masks["memory_mask"] = chosen[:, None].expand(2, inputs.tensors["query"].shape[1], -1)
    masks = {name: mask.to(target.device) for name, mask in masks.items()}
    leaves = {n: t.clone().requires_grad_() for n, t in inputs.tensors.items()}
    function = dot_attention if score == "dot" else concat_attention
    with target.active():
        context, _ = function(**leaves, **masks, backend=target.backend)
        grads = torch.autograd.grad(context, list(leaves.values()), inputs.grad_context)
    for name, grad in zip(leaves, grads, strict=True):
        assert name == "memory" or not grad.any(), name


def test_flops_are_counted() -> None:
    query, memory = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 5, 8)
    product = 2 * 2 * 3 * 5 * 8  # of (B, T, E) and (B, S, E)
    with FlopCounterMode(display=False) as counter:
        result, _ = dot_attention(query, memory)
        assert counter.get_total_flops() == 2 * product
        result.sum().backward()  # scores, dP and dQuery
        assert counter.get_total_flops() == 5 * product
        dot_attention(query, memory.requires_grad_())[0].sum().backward()
    assert counter.get_total_flops() == 5 * product + 7 * product


def test_what_is_not_an_ordinary_tensor_passes_the_operator() -> None:
    """A negated view, a meta tensor, a subclass and a mode are handled by the dispatcher."""
    query, memory = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    expected = dot_attention(query, memory)[0]
    negated = torch._neg_view(-memory)
    torch.testing.assert_close(dot_attention(query, negated)[0], expected)
    imaginary = torch.complex(query, -memory[:, :3]).conj().imag
    assert imaginary.is_neg()
    torch.testing.assert_close(
        dot_attention(query, imaginary)[0], dot_attention(query, memory[:, :3].clone())[0]
    )
    on_meta = dot_attention(query.to("meta"), memory.to("meta"))[0]
    assert on_meta.is_meta and on_meta.shape == expected.shape
    zeros = torch._efficientzerotensor((2, 5, 8))
    assert not dot_attention(query, zeros)[0].any()


def test_a_profiler_sees_the_operator() -> None:
    query, memory = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    with torch.profiler.profile(acc_events=True) as profile:
        dot_attention(query, memory)
    assert "fused_attn::dot_attention" in {event.name for event in profile.events()}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("dot_attention", ((2, 3, 0), (2, 5, 0)), "widths of at least 1"),
        ("concat_attention", ((2, 3, 0), (2, 5, 0), None, (0,), (2, 5, 4)), "widths of at least 1"),
        ("concat_attention", ((2, 3, 4), (2, 5, 4), None, (4,), (2, 5, 0)), "widths of at least 1"),
        ("concat_scores", ((2, 3, 0), (2, 5, 0), None, (0,)), "widths of at least 1"),
    ],
)
def test_a_raw_operator_refuses_what_it_cannot_read(
    name: str, arguments: tuple[Any, ...], message: str
) -> None:
    tensors = [None if shape is None else torch.zeros(shape) for shape in arguments]
    with pytest.raises(ValueError, match=message):
        op(name)(*tensors, backend="cpu")


@pytest.mark.parametrize("longest", [2**63 - 1, 2**41, -1])
def test_a_longest_source_that_cannot_be(longest: int) -> None:
    query, rows = torch.zeros(2, 3, 4), torch.zeros(5, 4)
    offsets = torch.tensor([0, 2, 5])
    with pytest.raises(ValueError, match="max_source"):
        ops.dot_forward(query, rows, offsets, backend="cpu", max_source=longest)
