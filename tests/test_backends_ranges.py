"""Concat scores whose tanh saturates or cancels, prepared exponentials, and very large scores."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from targets import Target, cancelled_sizes, every_target
from torch import Tensor

from fused_attn import functional, testing
from fused_attn.prepared import exponentials
from fused_attn.testing import DTYPES, Case, Inputs, Tensors

# What is added to W_q h_t and to W_m h_s. Around 22 the exponentials of a pair of terms overflow
# together, around 43 each does in float32, around 354 in float64.
SATURATED = [
    (20.0, 0.0), (-20.0, 0.0), (0.0, 20.0), (0.0, -20.0), (11.0, 11.0), (-11.0, -11.0),
    (22.5, 0.0), (44.0, 0.0), (0.0, -44.0), (25.0, 25.0), (-25.0, -25.0), (50.0, 0.0),
    (0.0, -50.0), (50.0, 50.0), (100.0, 0.0), (0.0, 100.0), (-50.0, -50.0), (-100.0, -100.0),
    (170.0, 180.0), (1e4, 0.0), (-1e4, 0.0), (0.0, 1e4), (0.0, -1e4), (5e3, 5e3), (-1e4, -1e4),
]  # fmt: skip
CANCELLING = [
    (20.0, -20.0), (-20.0, 20.0), (42.5, -42.5), (-43.5, 43.5), (60.0, -60.0), (-60.0, 60.0),
    (100.0, -100.0), (-350.0, 350.0), (1e4, -1e4), (-1e4, 1e4),
]  # fmt: skip
CASE = Case("projected", batch=2, queries=5, source=19, memory_dim=17, attn_dim=37, lengths=True)
STEP = replace(CASE, queries=1, source=37, memory_dim=32, attn_dim=64)


def short(value: object) -> str:
    return str(value).removeprefix("torch.")


def shift_id(shift: tuple[float, float]) -> str:
    return f"{shift[0]:+g}_{shift[1]:+g}"


def shifted(target: Target, case: Case, shift: tuple[float, float], columns: slice) -> Inputs:
    """Add ``shift`` to the query's and to the memory's projection, in some columns."""
    inputs = target.inputs(case)
    tensors = dict(inputs.tensors)
    for name, by in zip(("query_proj", "memory_proj"), shift, strict=True):
        tensors[name] = tensors[name].clone()
        tensors[name][..., columns] += by
    return replace(inputs, tensors=tensors)


def run_prepared(target: Target, inputs: Inputs) -> Tensors:
    """The call with exponentials of the memory's projection made before, as a decoder has them."""
    prepared = exponentials(inputs.tensors["memory_proj"])

    def call(tensors: Tensors) -> tuple[Tensor, Tensor | None]:
        operands = (tensors["query_proj"], tensors["memory_proj"], prepared, tensors["v"])
        return functional.attend_concat(
            *operands, tensors["memory"], inputs.masking, True, target.backend
        )

    with target.active(), testing.poisoned_empty():
        return testing.evaluate(call, inputs)


@every_target
@pytest.mark.parametrize("case", [CASE, STEP], ids=["sentence", "step"])
@pytest.mark.parametrize("prepared", [False, True], ids=["", "prepared"])
@pytest.mark.parametrize("shift", SATURATED + CANCELLING, ids=shift_id)
def test_some_columns_out_of_range(
    shift: tuple[float, float], prepared: bool, case: Case, target: Target
) -> None:
    """The other columns keep the gradients at their usual size, which sets the budget."""
    inputs = shifted(target, case, shift, slice(0, None, 3))
    got = run_prepared(target, inputs) if prepared else target.run(inputs)
    testing.check_results(got, testing.oracle(inputs), testing.plain(inputs))


@every_target
@pytest.mark.parametrize("prepared", [False, True], ids=["", "prepared"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shift", CANCELLING, ids=shift_id)
def test_every_column_cancels(
    shift: tuple[float, float], dtype: torch.dtype, prepared: bool, target: Target
) -> None:
    inputs = shifted(target, replace(CASE, dtype=dtype), shift, slice(None))
    got = run_prepared(target, inputs) if prepared else target.run(inputs)
    # At 1e4 nothing is left of the differences in 16 bits: every tanh is -1, 0 or 1.
    coarse = abs(shift[0]) > 1000 and dtype.itemsize == 2
    scales = cancelled_sizes(inputs) if coarse else None
    testing.check_results(got, testing.oracle(inputs), testing.plain(inputs), scales)


@every_target
@pytest.mark.parametrize("prepared", [False, True], ids=["", "prepared"])
@pytest.mark.parametrize(
    ("shift", "dtype"),
    # Every third in the other dtypes, another third in each.
    [(shift, torch.float32) for shift in SATURATED]
    + [
        (shift, dtype)
        for at, dtype in enumerate((torch.float64, torch.bfloat16, torch.float16))
        for shift in SATURATED[at::3]
    ],
    ids=lambda value: shift_id(value) if isinstance(value, tuple) else short(value),
)
def test_every_column_saturates(
    shift: tuple[float, float], dtype: torch.dtype, prepared: bool, target: Target
) -> None:
    """Then all scores are equal and gradients through them vanish, beside that of the memory."""
    inputs = shifted(target, replace(CASE, dtype=dtype), shift, slice(None))
    got = run_prepared(target, inputs) if prepared else target.run(inputs)
    scales = cancelled_sizes(inputs)
    testing.check_results(got, testing.oracle(inputs), testing.plain(inputs), scales)


@every_target
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_both_signs_in_one_row(dtype: torch.dtype, target: Target) -> None:
    """Saturated, cancelling and ordinary terms side by side, at random."""
    inputs = target.inputs(replace(CASE, dtype=dtype))
    generator = torch.Generator().manual_seed(1)
    tensors = dict(inputs.tensors)
    for name in ("query_proj", "memory_proj"):
        size = torch.tensor([0.0, 1.0, 20.0, 60.0, 100.0, 1e4])
        picked = torch.randint(len(size), tensors[name].shape, generator=generator)
        sign = torch.randint(2, tensors[name].shape, generator=generator) * 2 - 1
        tensors[name] = tensors[name] + (sign * size[picked]).to(tensors[name])
    inputs = replace(inputs, tensors=tensors)
    oracle, plain = testing.oracle(inputs), testing.plain(inputs)
    testing.check_results(target.run(inputs), oracle, plain)
    testing.check_results(run_prepared(target, inputs), oracle, plain)


@every_target
@pytest.mark.parametrize("size", ["sentence", "step"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_prepared_exponentials(dtype: torch.dtype, size: str, target: Target) -> None:
    case = replace({"sentence": CASE, "step": STEP}[size], dtype=dtype, mask="cube", keep=True)
    inputs = target.inputs(case)
    oracle, plain = testing.oracle(inputs), testing.plain(inputs)
    testing.check_results(run_prepared(target, inputs), oracle, plain)


@every_target
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("mask", ["none", "row", "cube"])
def test_prepared_exponentials_of_padding(value: float, mask: str, target: Target) -> None:
    clean = target.inputs(replace(CASE, batch=3, mask=mask))
    spoiled = testing.spoil_padding(clean, value)
    got, expected = run_prepared(target, spoiled), run_prepared(target, clean)
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_exponentials_are_exact_or_marked(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, -0.5, 1.0, 42.0, -42.0, 44.0, -44.0, 1e4, -1e4, torch.nan])
    values = values.to(dtype)
    got = exponentials(values)
    assert got.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    inside = values.abs() <= 43
    expected = torch.exp(2 * values.double())[inside]
    rounding = {torch.bfloat16: 2**-8, torch.float64: 1e-15}.get(dtype, 1e-6)
    torch.testing.assert_close(got[inside].double(), expected, rtol=rounding, atol=0.0)
    assert (got[~inside] == -1).all()


def large_scores(target: Target, dtype: torch.dtype, spread: float) -> Inputs:
    """Scores of 1e4 that differ by about ``spread`` between positions."""
    inputs = target.inputs(Case("dot", dtype, batch=2, source=19, memory_dim=17, lengths=True))
    tensors = {name: t * (spread / 2) ** 0.5 for name, t in inputs.tensors.items()}
    for tensor in tensors.values():
        tensor[..., 0] = 100.0
    return replace(inputs, tensors=tensors, scale=1.0)


# Not in float64: the oracle's own scores of 1e4 are rounded as coarsely as the kernel's.
NARROWER = (torch.float32, torch.float16, torch.bfloat16)


@every_target
@pytest.mark.parametrize("spread", [1.0, 2000.0])
@pytest.mark.parametrize("dtype", NARROWER, ids=short)
def test_large_scores(dtype: torch.dtype, spread: float, target: Target) -> None:
    """No overflow, and a softmax of the differences; far apart, one weight is 1."""
    inputs = large_scores(target, dtype, spread)
    got = target.run(inputs)
    oracle, plain = testing.oracle(inputs), testing.plain(inputs)
    testing.check_results(got, oracle, plain, cancelled_sizes(inputs))


@every_target
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=short)
@pytest.mark.parametrize("size", [1.0, 1e2, 1e4, 1e6])
def test_weights_sum_to_one_however_large_the_scores(
    size: float, dtype: torch.dtype, target: Target
) -> None:
    inputs = target.inputs(Case("dot", dtype, queries=7, source=37))
    inputs.tensors["query"][..., 0] = size
    inputs.tensors["memory"][..., 0] = 1.0
    sums = target.run(inputs)["weights"].sum(dim=-1)
    rounding = 40 * torch.finfo(dtype).eps
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=rounding, atol=0.0)


@every_target
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["plus", "minus"])
def test_scores_at_the_end_of_the_range(sign: float, target: Target) -> None:
    """Near the largest float32; the largest is subtracted before any exponential is taken."""
    inputs = target.inputs(Case("dot", queries=2, source=5, memory_dim=4))
    tensors = {
        "memory": torch.full_like(inputs.tensors["memory"], 1e18),
        "query": torch.full_like(inputs.tensors["query"], sign * 1e19),
    }
    got = target.run(replace(inputs, tensors=tensors, scale=1.0))
    torch.testing.assert_close(got["context"], torch.full_like(got["context"], 1e18))
    assert all(tensor.isfinite().all() for tensor in got.values())
