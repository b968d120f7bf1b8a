"""`LuongAttention`: parameters, forward against the functions, copies, dropout, autocast, errors.

Prepared memories and beams are tested in test_attention_prepared.py.
"""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from targets import Target, every_target
from torch import Tensor

from fused_attn import LuongAttention, functional

B, T, S, D, E, A, H = 3, 4, 6, 8, 10, 7, 5
SCORES = ("dot", "general", "concat")
LENGTHS = torch.tensor([S, 0, 4])


def make(score: str, **options: Any) -> LuongAttention:
    torch.manual_seed(0)
    return LuongAttention(E if score == "dot" else D, E, score, **options)


def draw(score: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(B, T, E if score == "dot" else D, generator=generator)
    return query.to(dtype), torch.randn(B, S, E, generator=generator).to(dtype)


def call_function(module: LuongAttention, query: Tensor, memory: Tensor, **rest: Any) -> Any:
    """The public function with the module's parameters."""
    parameters = dict(module.named_parameters())
    if module.score == "dot":
        return functional.dot_attention(query, memory, scale=module.scale, **rest)
    if module.score == "general":
        weight = parameters["query_proj.weight"].T
        return functional.general_attention(query, memory, weight, scale=module.scale, **rest)
    named = {
        "query_weight": parameters["query_proj.weight"],
        "memory_weight": parameters["memory_proj.weight"],
        "v": parameters["v"],
        "bias": parameters.get("query_proj.bias"),
    }
    return functional.concat_attention(query, memory, **named, **rest)


@pytest.mark.parametrize(
    ("score", "options", "expected"),
    [
        ("dot", {}, {}),
        ("dot", {"output_dim": H}, {"output_proj.weight": (H, 2 * E)}),
        ("general", {}, {"query_proj.weight": (E, D)}),
        ("general", {"bias": True}, {"query_proj.weight": (E, D), "query_proj.bias": (E,)}),
        (
            "general",
            {"output_dim": H},
            {"query_proj.weight": (E, D), "output_proj.weight": (H, E + D)},
        ),
        (
            "dot",
            {"output_dim": H, "output_bias": True},
            {"output_proj.weight": (H, 2 * E), "output_proj.bias": (H,)},
        ),
        (
            "concat",
            {"attn_dim": A},
            {"query_proj.weight": (A, D), "memory_proj.weight": (A, E), "v": (A,)},
        ),
        (
            "concat",
            {"bias": True, "output_dim": H},
            {
                "query_proj.weight": (E, D),
                "query_proj.bias": (E,),
                "memory_proj.weight": (E, E),
                "v": (E,),
                "output_proj.weight": (H, E + D),
            },
        ),
    ],
)
def test_parameters(score: str, options: dict[str, Any], expected: dict[str, Any]) -> None:
    module = make(score, **options)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == expected
    assert module.state_dict().keys() == expected.keys()


def test_defaults() -> None:
    module = LuongAttention(D)
    assert (module.score, module.memory_dim, module.backend) == ("general", D, "auto")
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "query_proj.weight": (D, D)
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_dtype_and_device_are_those_of_the_parameters(dtype: torch.dtype) -> None:
    options = {"output_dim": H, "bias": True, "dtype": dtype}
    module = make("concat", **options)
    assert {p.dtype for p in module.parameters()} == {dtype}
    context, weights = module(*draw("concat", dtype))
    assert context.dtype == weights.dtype == dtype
    assert {p.device.type for p in make("concat", device="meta").parameters()} == {"meta"}


def test_initial_parameters_are_those_of_linear_layers() -> None:
    module = make("concat", attn_dim=400)
    bounds = {"query_proj.weight": D, "memory_proj.weight": E, "v": 400}
    for name, parameter in module.named_parameters():
        bound = bounds[name] ** -0.5
        assert 0.9 * bound < float(parameter.detach().abs().max()) <= bound
    before = copy.deepcopy(module.state_dict())
    module.reset_parameters()
    assert not any(torch.equal(before[name], p) for name, p in module.named_parameters())


@pytest.mark.parametrize("masked", ["none", "lengths", "mask"])
@pytest.mark.parametrize("score", SCORES)
def test_module_is_the_function_with_parameters(score: str, masked: str) -> None:
    options = {} if score == "dot" else {"bias": score == "concat"}
    module = make(score, **options)
    query, memory = draw(score)
    mask = torch.rand(B, T, S, generator=torch.Generator().manual_seed(2)) > 0.3
    rest = {"none": {}, "lengths": {"memory_lengths": LENGTHS}, "mask": {"memory_mask": mask}}
    expected = call_function(module, query, memory, return_weights=True, **rest[masked])
    got = module(query, memory, **rest[masked])
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])


@pytest.mark.parametrize("score", ["dot", "general"])
def test_scale_and_bias(score: str) -> None:
    module = make(score, scale=0.25, **({} if score == "dot" else {"bias": True}))
    query, memory = draw(score)
    projected = query if score == "dot" else module.query_proj(query)
    expected = torch.softmax(0.25 * projected @ memory.mT, dim=-1)
    torch.testing.assert_close(module(query, memory)[1], expected)


@pytest.mark.parametrize("steps", [None, T], ids=["one_step", "sentence"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("score", SCORES)
def test_attentional_state_is_tanh_of_context_then_query(
    score: str, bias: bool, steps: int | None
) -> None:
    module = make(score, output_dim=H, output_bias=bias)
    query, memory = draw(score)
    query = query if steps else query[:, 0]
    state, weights = module(query, memory, LENGTHS)
    context, _ = call_function(module, query, memory, memory_lengths=LENGTHS)
    weight = module.output_proj.weight
    added = module.output_proj.bias if bias else 0.0
    expected = torch.tanh(context @ weight[:, :E].T + query @ weight[:, E:].T + added)
    assert state.shape == (*query.shape[:-1], H) and weights.shape == (*query.shape[:-1], S)
    torch.testing.assert_close(state, expected)


@pytest.mark.parametrize("score", SCORES)
def test_weights_can_be_left_out(score: str) -> None:
    module = make(score)
    query, memory = draw(score)
    context, weights = module(query, memory, return_weights=False)
    assert weights is None
    assert torch.equal(context, module(query, memory)[0])


@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
@pytest.mark.parametrize("score", SCORES)
def test_a_copy_computes_the_same(score: str, how: str) -> None:
    options = {"output_dim": H, "dropout": 0.5, "backend": "eager"}
    module = make(score, **options)
    if how == "state_dict":
        other = LuongAttention(module.query_dim, E, score, **options)
        assert other.load_state_dict(module.state_dict()).missing_keys == []
    else:
        other = copy.deepcopy(module) if how == "deepcopy" else pickle.loads(pickle.dumps(module))
    assert repr(other) == repr(module)
    inputs = draw(score)
    expected, got = module.eval()(*inputs, LENGTHS), other.eval()(*inputs, LENGTHS)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    for parameter in other.parameters():
        parameter.data.zero_()
    assert all(parameter.any() for parameter in module.parameters())


def test_repr_says_what_is_not_the_default() -> None:
    module = make("general", scale=0.5, dropout=0.1, backend="eager")
    text = f"{D}, {E}, score='general', scale=0.5, dropout=0.1, backend='eager'"
    assert module.extra_repr() == text
    assert make("dot").extra_repr() == f"{E}, {E}, score='dot'"


@pytest.mark.parametrize("score", SCORES)
def test_dropout_only_while_training(score: str) -> None:
    module = make(score, dropout=0.5)
    query, memory = draw(score)
    whole, alignment = module.eval()(query, memory)
    assert torch.equal(module(query, memory)[0], whole)
    torch.manual_seed(0)
    dropped, weights = module.train()(query, memory)
    assert not torch.allclose(dropped, whole)
    torch.testing.assert_close(weights, alignment)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("score", SCORES)
def test_autocast(score: str, dtype: torch.dtype) -> None:
    module = make(score, output_dim=H)
    query, memory = draw(score)
    expected, _ = module(query, memory, LENGTHS)
    with torch.autocast("cpu", dtype=dtype):
        state, weights = module(query, memory, LENGTHS)
    assert state.dtype == weights.dtype == dtype
    torch.testing.assert_close(state.float(), expected, rtol=0.0, atol=0.05)
    state.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("score", SCORES)
def test_second_derivatives(score: str) -> None:
    """With respect to all parameters and both inputs, as for a gradient penalty."""
    module = make(score, output_dim=2, dtype=torch.float64)
    query, memory = (t[:, :2, :].requires_grad_() for t in draw(score, torch.float64))
    names = [name for name, _ in module.named_parameters()]

    def call(query: Tensor, memory: Tensor, *parameters: Tensor) -> Any:
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(module, named, (query, memory, torch.tensor([2, 0, 1])))

    leaves = (query, memory, *module.parameters())
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@every_target
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("score", SCORES)
def test_padding_reaches_no_parameter(score: str, value: float, target: Target) -> None:
    module = make(score, output_dim=H, backend=target.backend).to(target.device)
    query, clean = (t.to(target.device) for t in draw(score))
    lengths = LENGTHS.to(target.device)
    spoiled = clean.clone()
    for b, length in enumerate(LENGTHS.tolist()):
        spoiled[b, length:] = value
    found = []
    for memory in (clean, spoiled):
        memory.requires_grad_()
        with target.active():
            state, weights = module(query, memory, lengths)
            loss = state.square().sum() + weights.square().sum()
            grads = torch.autograd.grad(loss, [memory, *module.parameters()])
        found.append([state, weights, *grads])
    for got, expected in zip(found[1], found[0], strict=True):
        assert expected.any()
        assert torch.equal(got, expected)


BAD_OPTIONS = [
    ({"query_dim": 0}, ValueError, "query_dim must be a positive int, got 0"),
    ({"query_dim": 2.0}, ValueError, "query_dim must be a positive int, got 2.0"),
    ({"memory_dim": -1}, ValueError, "memory_dim must be a positive int, got -1"),
    ({"attn_dim": 0, "score": "concat"}, ValueError, "attn_dim must be a positive int, got 0"),
    ({"output_dim": True}, ValueError, "output_dim must be a positive int, got True"),
    ({"output_bias": True}, ValueError, "output_bias must be False if output_dim is None"),
    ({"score": "mlp"}, ValueError, "one of 'dot', 'general', 'concat', 'location', got 'mlp'"),
    ({"score": "dot"}, ValueError, "score 'dot' requires query_dim == memory_dim, got 8 and 10"),
    ({"attn_dim": 4}, ValueError, "attn_dim must be None unless score='concat', got 4 with"),
    ({"score": "dot", "memory_dim": D, "bias": True}, ValueError, "bias must be False for score"),
    ({"scale": "big"}, TypeError, "scale must be a number or 'learned', got 'big'"),
    ({"dropout": 1.1}, ValueError, "dropout must be a probability in 0..1, got 1.1"),
    (
        {"backend": "gpu"},
        ValueError,
        "backend must be one of 'auto', 'cpu', 'cuda', 'triton', 'eager', got 'gpu'",
    ),
    ({"local": "both"}, ValueError, "local must be None or one of 'monotonic', 'predictive', got"),
    ({"local": "monotonic", "window": 0}, ValueError, "window must be positive and finite, got 0"),
    ({"local": "monotonic", "window": "2"}, TypeError, "window must be a number, got '2'"),
    ({"normalizer": "relu"}, ValueError, "normalizer must be one of 'softmax', 'sparsemax', got"),
    ({"weight_norm": True}, ValueError, "weight_norm requires score='concat', got weight_norm="),
    ({"layer_norm": True}, ValueError, "layer_norm requires score='concat', got layer_norm=True"),
    ({"coverage": True}, ValueError, "coverage requires score='concat', got coverage=True"),
    ({"conv_channels": 3}, ValueError, "conv_channels requires score='concat', got conv_channels"),
    ({"score": "concat", "conv_channels": -1}, ValueError, "conv_channels must be a non-negative"),
    ({"score": "concat", "conv_width": 4}, ValueError, "conv_width must be a positive odd int"),
    ({"max_source": 9}, ValueError, "max_source must be None for score 'general', got 9"),
    ({"score": "location"}, ValueError, "max_source must be the maximum source length"),
]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [pytest.param(*row, id="-".join(map(str, row[0]))) for row in BAD_OPTIONS],
)
def test_bad_option(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        LuongAttention(**{"query_dim": D, "memory_dim": E} | options)


BAD_CALLS = [
    ("memory", torch.ones(B, S, E + 1), ValueError, f"memory must have shape (B, S, {E}), got "),
    ("memory", torch.ones(S, E), ValueError, "memory must have shape (B, S, E) with E >= 1"),
    ("memory", [1.0], TypeError, "memory must be a Tensor, got list"),
    ("query", torch.ones(B, T, D + 1), ValueError, "and the width of query_dim, got (3, 4, 9)"),
    ("query", torch.ones(B + 1, D), ValueError, "query must have shape (3, T, 8) or (3, 8)"),
    ("query", torch.ones(B, T, D).double(), TypeError, "query must have the dtype of memory"),
    ("query", None, TypeError, "query must be a Tensor, got NoneType"),
    ("memory_lengths", torch.tensor([1, 2, 7]), ValueError, "memory_lengths must lie in 0..6"),
    ("memory_lengths", torch.ones(B), TypeError, "memory_lengths must be an integer Tensor"),
    ("memory_mask", torch.ones(B, S), TypeError, "memory_mask must be a bool Tensor"),
    ("memory_mask", torch.ones(B, T + 1, S) > 0, ValueError, "memory_mask must have shape (B, S)"),
]


@pytest.mark.parametrize("score", ["general", "concat"])
@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [pytest.param(*row, id=f"{row[0]}-{i}") for i, row in enumerate(BAD_CALLS)],
)
def test_bad_argument(
    score: str, name: str, value: object, error: type[Exception], message: str
) -> None:
    query, memory = draw(score)
    with pytest.raises(error, match=re.escape(message)):
        make(score)(**{"query": query, "memory": memory} | {name: value})
