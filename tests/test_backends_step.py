"""One query with a prepared memory: the loop of a decoding step, and where its factors overflow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from targets import Target, every_target

from fused_attn import functional, testing
from fused_attn.prepared import exponentials
from fused_attn.reference import Masking
from fused_attn.testing import Case, Inputs, Tensors


def prepared_step(inputs: Inputs, backend: str) -> Tensors:
    """The context, with the exponentials of the projection at hand."""
    tensors = inputs.tensors
    masking = Masking(*inputs.masking)
    operands = (tensors["query_proj"], tensors["memory_proj"])
    exp = exponentials(tensors["memory_proj"])
    rest = (tensors["v"], tensors["memory"], masking, True, backend)
    with torch.no_grad():
        context, weights = functional.attend_concat(*operands, exp, *rest)
    assert weights is not None
    return {"context": context, "weights": weights}


def check(target: Target, case: Case, spread: float, rows: slice = slice(None)) -> None:
    """Hold the step against the oracle, ``rows`` of the projection ``spread`` times as large."""
    inputs = target.inputs(case)
    projection = inputs.tensors["memory_proj"].clone()
    projection[:, rows] *= spread
    inputs = replace(inputs, tensors=inputs.tensors | {"memory_proj": projection})
    with target.active(), testing.poisoned_empty():
        got = prepared_step(inputs, target.backend)
    oracle, plain = testing.oracle(inputs), testing.plain(inputs)
    testing.check_results(got, {n: oracle[n] for n in got}, {n: plain[n] for n in got})


DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16,
          "bfloat16": torch.bfloat16}  # fmt: skip
WIDTHS = {"memory_dim": 64, "attn_dim": 128}  # whole vectors of every instruction set


@every_target
@pytest.mark.parametrize("spread", [0.0, 1.0, 7.0, 25.0, 1e3])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_prepared_step_is_right_in_every_range(
    dtype: torch.dtype, spread: float, target: Target
) -> None:
    check(target, Case("projected", dtype, queries=1, source=37, lengths=True, **WIDTHS), spread)


@every_target
@pytest.mark.parametrize("source", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_group_of_rows_may_be_cut_short(dtype: torch.dtype, source: int, target: Target) -> None:
    case = Case("projected", dtype, queries=1, source=source, keep=True, **WIDTHS)
    check(target, case, 1.0)


@every_target
@pytest.mark.parametrize("row", [0, 3, 36])
def test_one_row_out_of_range_is_scored_with_care(row: int, target: Target) -> None:
    case = Case("projected", queries=1, source=37, **WIDTHS)
    check(target, case, 100.0, slice(row, row + 1))
