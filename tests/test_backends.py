"""Every backend against the fp64 oracle: values and every gradient, within the error budget."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from targets import Target, every_target
from torch import Tensor

from fused_attn import functional, testing
from fused_attn.testing import DTYPES, LAYOUTS, MASKS, SCORES, Case, Inputs, Tensors

# (B, T, S, E, D, A): one, odd, a vector and one more, several chunks, several segments of S.
SIZES = {
    "ones": (1, 1, 1, 1, 1, 1),
    "one_row": (2, 5, 1, 7, 16, 17),
    "step": (3, 1, 37, 17, 7, 37),
    "sevens": (2, 7, 7, 7, 17, 1),
    "odd": (3, 17, 37, 37, 7, 17),
    "beam": (2, 4, 64, 64, 37, 64),
    "wide": (1, 2, 5, 1000, 37, 1000),
    "long": (1, 3, 1000, 64, 1, 33),
    "sentence": (2, 70, 65, 33, 64, 48),
}


def sized(score: str, dtype: torch.dtype, name: str, **options: object) -> Case:
    batch, queries, source, memory_dim, query_dim, attn_dim = SIZES[name]
    return Case(
        score, dtype, batch, queries, source, query_dim, memory_dim, attn_dim, **options
    )  # fmt: skip


def short(value: object) -> str:
    return str(value).removeprefix("torch.")


@every_target
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("score", SCORES)
def test_sizes(score: str, dtype: torch.dtype, size: str, target: Target) -> None:
    target.check(sized(score, dtype, size, weights=size != "wide"))


@every_target
@pytest.mark.parametrize("size", ["step", "odd", "long"])
@pytest.mark.parametrize("keep", [False, True], ids=["", "keep"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", [False, True], ids=["", "lengths"])
@pytest.mark.parametrize("score", ["dot", "concat"])  # with either, one operator and its masks
def test_masks(score: str, lengths: bool, mask: str, keep: bool, size: str, target: Target) -> None:
    if size == "long" and keep:
        target.needs_speed()
    case = sized(score, torch.float32, size, lengths=lengths, mask=mask, keep=keep)
    target.check(replace(case, batch=3))


@every_target
@pytest.mark.parametrize("size", ["step", "odd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=short)
@pytest.mark.parametrize("score", SCORES)
def test_everything_masked_at_once(
    score: str, dtype: torch.dtype, size: str, target: Target
) -> None:
    target.check(sized(score, dtype, size, lengths=True, mask="cube", keep=True))


@every_target
@pytest.mark.parametrize("size", ["step", "beam"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("score", SCORES)
def test_layouts(score: str, dtype: torch.dtype, layout: str, size: str, target: Target) -> None:
    target.check(sized(score, dtype, size, lengths=True, mask="cube", keep=True, layout=layout))


@every_target
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("weights", [False, True], ids=["no_weights", "weights"])
def test_bias_and_weights_of_concat(bias: bool, weights: bool, target: Target) -> None:
    target.check(sized("concat", torch.float32, "odd", bias=bias, weights=weights, lengths=True))


@every_target
@pytest.mark.parametrize("size", ["step", "odd", "long"])
@pytest.mark.parametrize("score", SCORES)
def test_weights_are_not_needed_for_the_rest(score: str, size: str, target: Target) -> None:
    target.check(sized(score, torch.float32, size, lengths=True, keep=True, weights=False))


@every_target
@pytest.mark.parametrize("score", SCORES)
def test_a_sum_sends_back_one_number_for_all(score: str, target: Target) -> None:
    """The gradient of `.sum()` has no strides at all, which is how most of them arrive."""
    inputs = target.inputs(sized(score, torch.float32, "odd", lengths=True))
    ones = torch.ones((), device=target.device)
    inputs = replace(
        inputs,
        grad_context=ones.expand(inputs.grad_context.shape),
        grad_weights=(2 * ones).expand(inputs.grad_weights.shape),
    )
    got = target.run(inputs)
    testing.check_results(got, testing.oracle(inputs), testing.plain(inputs))


def attend(inputs: Inputs, tensors: Tensors, backend: str) -> tuple[Tensor, Tensor]:
    """Both results, on arguments that need no projection."""
    masking, memory = inputs.masking, tensors["memory"]
    if inputs.score == "dot":
        query, scale = tensors["query"], inputs.scale
        return functional.attend_dot(query, memory, scale, masking, True, backend)
    query, keys, v = tensors["query_proj"], tensors["memory_proj"], tensors["v"]
    return functional.attend_concat(query, keys, None, v, memory, masking, True, backend)


@every_target
@pytest.mark.parametrize("root", ["context", "weights"])
@pytest.mark.parametrize("score", ["dot", "projected"])
def test_gradient_of_one_result_alone(score: str, root: str, target: Target) -> None:
    """Autograd hands the backward None for a result that the loss does not use: it means zeros."""
    inputs = target.inputs(sized(score, torch.float32, "odd", lengths=True, mask="cube"))
    unused = "grad_weights" if root == "context" else "grad_context"
    zeros = replace(inputs, **{unused: torch.zeros_like(getattr(inputs, unused))})
    oracle, plain = testing.oracle(zeros), testing.plain(zeros)
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.tensors.items()}
    grad_output = getattr(inputs, f"grad_{root}")
    with target.active(), testing.poisoned_empty():
        result = attend(inputs, leaves, target.backend)[root == "weights"]
        grads = torch.autograd.grad(
            result, list(leaves.values()), grad_output, materialize_grads=True
        )
    got = {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    testing.check_results(got, {name: oracle[name] for name in got}, plain)


@every_target
@pytest.mark.parametrize("score", ["dot", "projected"])
def test_gradient_of_one_input_alone(score: str, target: Target) -> None:
    inputs = target.inputs(sized(score, torch.float32, "odd", lengths=True))
    together = target.run(inputs)
    for name, tensor in inputs.tensors.items():
        leaf = tensor.clone().requires_grad_()
        with target.active():
            results = attend(inputs, inputs.tensors | {name: leaf}, target.backend)
            grad_outputs = (inputs.grad_context, inputs.grad_weights)
            (alone,) = torch.autograd.grad(results, leaf, grad_outputs)
        if name == "v":  # its sum alone is another loop, whose additions contract in another way
            torch.testing.assert_close(alone, together["grad_v"])
        else:
            assert torch.equal(alone, together[f"grad_{name}"]), name


@every_target
@pytest.mark.parametrize("width", [33, 48, 64, 80, 300])
@pytest.mark.parametrize("score", ["dot", "general"])
def test_a_split_source_of_any_width(score: str, width: int, target: Target) -> None:
    """Partial results lie at one stride for who writes and who reads them, padding included."""
    target.needs_speed()
    sizes = {"batch": 1, "queries": 20, "source": 700, "memory_dim": width}
    target.check(Case(score, torch.bfloat16, **sizes))


@every_target
@pytest.mark.parametrize("empty", ["batch", "queries", "source"])
@pytest.mark.parametrize("score", SCORES)
def test_an_empty_dimension(score: str, empty: str, target: Target) -> None:
    """No sentence, no query or nothing to read: zeros of the right shape, and zero gradients."""
    case = replace(sized(score, torch.float32, "odd", mask="cube"), **{empty: 0})
    inputs = target.inputs(case)
    got = target.run(inputs)
    assert got["context"].shape == (case.batch, case.queries, case.memory_dim)
    assert got["weights"].shape == (case.batch, case.queries, case.source)
    for name, tensor in inputs.tensors.items():
        assert got[f"grad_{name}"].shape == tensor.shape
    assert all(not tensor.any() for tensor in got.values())


@every_target
@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=short
)
def test_lengths_of_every_integer_type(dtype: torch.dtype, target: Target) -> None:
    inputs = target.inputs(sized("dot", torch.float32, "odd", lengths=True))
    lengths = inputs.masking.memory_lengths
    narrow = replace(inputs, masking=inputs.masking._replace(memory_lengths=lengths.to(dtype)))
    expected, got = target.run(inputs), target.run(narrow)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@every_target
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "transposed"])
@pytest.mark.parametrize("score", SCORES)
def test_inputs_are_left_as_they_are(score: str, layout: str, target: Target) -> None:
    case = sized(score, torch.float32, "odd", lengths=True, mask="cube", keep=True, layout=layout)
    inputs, untouched = target.inputs(case), target.inputs(case)
    target.run(inputs)
    for name, tensor in inputs.tensors.items():
        assert torch.equal(tensor, untouched.tensors[name])
    assert torch.equal(inputs.grad_context, untouched.grad_context)
    for mask, before in zip(inputs.masking[:3], untouched.masking[:3], strict=True):
        assert torch.equal(mask, before)
