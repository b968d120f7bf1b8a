"""The public functions: errors for bad arguments, autocast, one-step queries, derivatives."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attn
from fused_attn import backends, functional

B, T, S, D, E, A = 2, 3, 5, 6, 4, 7
SCORES = ("dot", "general", "concat")


def arguments(score: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Valid arguments of the function, by name."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = {"query": draw(B, T, E if score == "dot" else D), "memory": draw(B, S, E)}
    if score == "general":
        tensors["weight"] = draw(D, E)
    if score == "concat":
        tensors |= {"query_weight": draw(A, D), "memory_weight": draw(A, E), "v": draw(A)}
        tensors["bias"] = draw(A)
    return tensors


def function(score: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    return getattr(functional, f"{score}_attention")


def short(value: object) -> str:
    return str(value).removeprefix("torch.")


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(*shape, dtype=dtype)


# Name of the argument, bad value, error, and the part of the message with expected and got.
BAD_TENSORS = [
    ("memory", None, TypeError, "memory must be a Tensor, got NoneType"),
    ("memory", [[1.0]], TypeError, "memory must be a Tensor, got list"),
    ("memory", ones(S, E), ValueError, "memory must have shape (B, S, E) with E >= 1, got (5, 4)"),
    ("memory", ones(B, S, 0), ValueError, "memory must have shape (B, S, E) with E >= 1, got (2, "),
    ("memory", ones(B, S, E).long(), TypeError, "memory must have one of the dtypes float32"),
    ("memory", ones(B, S, E).cfloat(), TypeError, "bfloat16, float16, float64, got complex64"),
    ("query", "h", TypeError, "query must be a Tensor, got str"),
    ("query", ones(B, T, 9), ValueError, "query must have shape (2, T, "),
    ("query", ones(B, 1, T, 4), ValueError, "got (2, 1, 3, 4)"),
    ("query", ones(4), ValueError, "got (4,)"),
    ("query", ones(B + 1, T, 4), ValueError, "to go with memory (2, 5, 4)"),
    ("query", ones(B, T, 4).int(), TypeError, "query must have one of the dtypes"),
    ("memory_lengths", [5, 3], TypeError, "memory_lengths must be an integer Tensor, got list"),
    ("memory_lengths", ones(B), TypeError, "an integer Tensor, got float32"),
    ("memory_lengths", ones(B) > 0, TypeError, "an integer Tensor, got bool"),
    (
        "memory_lengths",
        ones(B + 1).long(),
        ValueError,
        "memory_lengths must have shape (B,) = (2,)",
    ),
    ("memory_lengths", ones(B, 1).long(), ValueError, "got (2, 1)"),
    ("memory_lengths", torch.tensor([5, 6]), ValueError, "memory_lengths must lie in 0..5"),
    ("memory_lengths", torch.tensor([-1, 5]), ValueError, "(the source length of memory), got -1"),
    ("memory_mask", ones(B, S).long(), TypeError, "memory_mask must be a bool Tensor (True = "),
    ("memory_mask", [[True]], TypeError, "memory_mask must be a bool Tensor"),
    ("memory_mask", ones(S) > 0, ValueError, "memory_mask must have shape (B, S) = (2, 5)"),
    ("memory_mask", ones(S, B) > 0, ValueError, "got (5, 2)"),
    ("memory_mask", ones(B, 2, S) > 0, ValueError, "(B, 1, S) or (B, T, S) = (2, 3, 5), got (2, "),
    ("memory_mask", ones(1, T, S) > 0, ValueError, "got (1, 3, 5)"),
    ("memory_mask", ones(B, 1, T, S) > 0, ValueError, "got (2, 1, 3, 5)"),
    ("dropout_p", -0.1, ValueError, "dropout_p must be a probability in 0..1, got -0.1"),
    ("dropout_p", 1.5, ValueError, "dropout_p must be a probability in 0..1, got 1.5"),
    ("dropout_p", torch.nan, ValueError, "dropout_p must be a probability in 0..1, got nan"),
    (
        "backend",
        "cuda9",
        ValueError,
        "backend must be one of 'auto', 'cpu', 'cuda', 'triton', 'eager', got 'cuda9'",
    ),
    (
        "backend",
        None,
        ValueError,
        "backend must be one of 'auto', 'cpu', 'cuda', 'triton', 'eager', got None",
    ),
    ("window", 3, TypeError, "window must be a LocalWindow or None, got int"),
]
BAD_PARAMETERS = {
    "general": [
        ("weight", None, TypeError, "weight must be a Tensor, got NoneType"),
        ("weight", ones(D, E + 1), ValueError, "weight must have shape (D, E) = (any, 4), got (6,"),
        ("weight", ones(E), ValueError, "weight must have shape (D, E) = (any, 4), got (4,)"),
        ("weight", ones(0, E), ValueError, "got (0, 4)"),
        ("weight", ones(D, E).double(), TypeError, "weight must have the dtype of memory, float32"),
        ("weight", ones(D + 1, E), ValueError, "and the width of weight, got (2, 3, 6)"),
    ],
    "concat": [
        ("v", ones(A, 1), ValueError, "v must have shape (A,) = "),
        ("v", ones(A + 1), ValueError, "query_weight must have shape (A, D) = (8, any)"),
        ("v", ones(A).half(), TypeError, "v must have the dtype of memory, float32, got float16"),
        ("query_weight", ones(A, D + 1), ValueError, "the width of query_weight, got (2, 3, 6)"),
        ("query_weight", ones(D, A), ValueError, "query_weight must have shape (A, D) = (7, any)"),
        ("memory_weight", ones(A, D), ValueError, "memory_weight must have shape (A, E) = (7, 4)"),
        ("memory_weight", 1.0, TypeError, "memory_weight must be a Tensor, got float"),
        ("bias", ones(D), ValueError, "bias must have shape (A,) = (7"),
        ("bias", ones(A).long(), TypeError, "bias must have one of the dtypes"),
    ],
}  # fmt: skip
BAD = [(score, *bad) for score in SCORES for bad in BAD_TENSORS]
BAD += [(score, *bad) for score, rows in BAD_PARAMETERS.items() for bad in rows]


@pytest.mark.parametrize(
    ("score", "name", "value", "error", "message"),
    [pytest.param(*row, id=f"{row[0]}-{row[1]}-{i}") for i, row in enumerate(BAD)],
)
def test_bad_argument(
    score: str, name: str, value: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        function(score)(**arguments(score) | {name: value})


@pytest.mark.parametrize("score", SCORES)
def test_dtypes_that_differ(score: str) -> None:
    with pytest.raises(TypeError, match="query must have the dtype of memory, float32, got bfl"):
        function(score)(**arguments(score) | {"query": arguments(score)["query"].bfloat16()})


@pytest.mark.parametrize(
    ("score", "name"),
    [(score, name) for score in SCORES for name in arguments(score) if name != "memory"]
    + [("dot", "memory_lengths"), ("dot", "memory_mask")],
)
def test_devices_that_differ(score: str, name: str) -> None:
    """The meta device stands for any other device."""
    extras = {"memory_lengths": torch.tensor([S, S]), "memory_mask": ones(B, S) > 0}
    good = arguments(score) | extras
    with pytest.raises(ValueError, match=f"{name} must be on the device of memory, cpu, got meta"):
        function(score)(**good | {name: good[name].to("meta")})


@pytest.mark.parametrize("score", SCORES)
def test_two_dimensional_query_is_one_step(score: str) -> None:
    good = arguments(score)
    query = good.pop("query")
    mask = torch.rand(B, S, generator=torch.Generator().manual_seed(1)) > 0.3
    rest = good | {"memory_lengths": torch.tensor([S, 3]), "return_weights": True}
    for step_mask in (None, mask, mask[:, None]):
        expected = function(score)(query=query[:, :1], **rest, memory_mask=step_mask)
        context, weights = function(score)(query=query[:, 0], **rest, memory_mask=step_mask)
        assert context.shape == (B, E) and weights.shape == (B, S)
        torch.testing.assert_close(context, expected[0][:, 0])
        torch.testing.assert_close(weights, expected[1][:, 0])


@pytest.mark.parametrize("score", SCORES)
def test_two_dimensional_query_takes_no_mask_of_several(score: str) -> None:
    good = arguments(score)
    good["query"] = good["query"][:, 0]
    with pytest.raises(ValueError, match=re.escape("(B, T, S) = (2, 1, 5), got (2, 3, 5)")):
        function(score)(**good, memory_mask=ones(B, T, S) > 0)


@pytest.mark.parametrize("score", SCORES)
def test_weights_come_only_when_asked_for(score: str) -> None:
    context, weights = function(score)(**arguments(score))
    assert context.shape == (B, T, E) and weights is None
    again, weights = function(score)(**arguments(score), return_weights=True)
    assert torch.equal(again, context) and weights.shape == (B, T, S)


@pytest.mark.parametrize("score", SCORES)
def test_true_means_attend(score: str) -> None:
    """As in `scaled_dot_product_attention`; a mask that is all True changes nothing."""
    good = arguments(score) | {"return_weights": True}
    mask = torch.tensor([[True, False, True, False, False], [False, False, False, True, True]])
    _, weights = function(score)(**good, memory_mask=mask)
    assert (weights.sum(dim=1)[mask] > 0).all()
    assert not weights.sum(dim=1)[~mask].any()
    everything = function(score)(**good, memory_mask=torch.ones_like(mask))
    assert torch.equal(everything[0], function(score)(**good)[0])
    assert "True = attend" in functional.__doc__
    assert "nn.MultiheadAttention` means the opposite" in functional.__doc__


def test_polarity_is_that_of_scaled_dot_product_attention() -> None:
    good = arguments("dot", torch.float64)
    mask = torch.rand(B, T, S, generator=torch.Generator().manual_seed(1)) > 0.5
    mask[..., 0] = True
    context, _ = functional.dot_attention(**good, memory_mask=mask, scale=0.5)
    memory = good["memory"]
    expected = torch.nn.functional.scaled_dot_product_attention(
        good["query"], memory, memory, mask, scale=0.5
    )
    torch.testing.assert_close(context, expected)


@pytest.mark.parametrize("score", ["dot", "general"])
def test_scale_is_a_number_or_a_tensor_with_a_gradient(score: str) -> None:
    good = arguments(score, torch.float64)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    expected, _ = function(score)(**good, scale=0.7)
    context, _ = function(score)(**good, scale=scale)
    torch.testing.assert_close(context, expected)
    assert torch.autograd.gradcheck(lambda s: function(score)(**good, scale=s)[0], scale)


@pytest.mark.parametrize("score", SCORES)
def test_lengths_and_mask_must_both_allow_a_position(score: str) -> None:
    good = arguments(score) | {"return_weights": True}
    mask = torch.tensor([[True, False, True, True, True], [False, True, True, True, True]])
    lengths = torch.tensor([3, 2])
    both = mask & (torch.arange(S) < lengths[:, None])
    expected = function(score)(**good, memory_mask=both)
    got = function(score)(**good, memory_mask=mask, memory_lengths=lengths)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("score", SCORES)
def test_autocast(score: str, dtype: torch.dtype) -> None:
    """All arguments are cast, and gradients have the dtypes of the arguments."""
    good = {name: t.requires_grad_() for name, t in arguments(score).items()}
    with torch.autocast("cpu", dtype=dtype):
        context, weights = function(score)(**good, return_weights=True)
    assert context.dtype == weights.dtype == dtype
    cast = {name: t.detach().to(dtype) for name, t in good.items()}
    expected, _ = function(score)(**cast)
    assert torch.equal(context, expected)
    context.float().square().sum().backward()
    for name, tensor in good.items():
        assert tensor.grad.dtype == torch.float32
        assert tensor.grad.isfinite().all() and tensor.grad.any(), name


@pytest.mark.parametrize("score", SCORES)
def test_autocast_leaves_float64_alone(score: str) -> None:
    good = arguments(score, torch.float64)
    expected, _ = function(score)(**good)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        context, _ = function(score)(**good)
    assert torch.equal(context, expected)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5, 1.0])
def test_dropout_takes_its_randomness_from_torch(dropout_p: float) -> None:
    good = arguments("dot") | {"dropout_p": dropout_p, "return_weights": True}
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(functional.dot_attention(**good)[0])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2]) == (dropout_p != 0.5)
    assert found[0].any() == (dropout_p != 1.0)


@pytest.mark.parametrize("score", SCORES)
def test_second_derivatives(score: str) -> None:
    """With the backend that "auto" chooses."""
    good = arguments(score, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in good.values()]
    lengths = torch.tensor([S, 3])

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        named = dict(zip(good, tensors, strict=True))
        return function(score)(**named, memory_lengths=lengths, return_weights=True)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("name", [*fused_attn.__all__])
def test_public_names_are_there_and_documented(name: str) -> None:
    public = getattr(fused_attn, name)
    assert name in dir(fused_attn)
    assert name == "__version__" or public.__doc__


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'fused_attn' has no attribute 'dot_atention'"):
        _ = fused_attn.dot_atention


@pytest.mark.parametrize("backend", backends.BACKENDS)
def test_every_known_backend_is_a_module(backend: str) -> None:
    if reasons := backends.unavailable_reasons(backend):
        pytest.skip(f"{backend}: {'; '.join(reasons)}")
    for needed in ("unavailable_reasons", "not_supported_reasons", "dot_forward", "dot_backward"):
        assert callable(getattr(backends.load(backend), needed))


@pytest.mark.parametrize("score", ["general", "concat"])
def test_a_query_of_no_width_is_refused(score: str) -> None:
    query, memory = torch.ones(2, 3, 0), torch.ones(2, 5, 8)
    weights = {"general": (torch.ones(0, 8),)}
    weights["concat"] = (torch.ones(4, 0), torch.ones(4, 8), torch.ones(4))
    with pytest.raises(ValueError, match="weight must have shape"):
        getattr(functional, f"{score}_attention")(query, memory, *weights[score])
