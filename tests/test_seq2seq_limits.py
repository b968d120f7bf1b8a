"""The largest length of a target for the length of its source."""

from __future__ import annotations

import math

import pytest
import torch

from fused_attn.seq2seq.search.constraints import LengthBound

LENGTHS = torch.tensor([0, 1, 7, 40])


@pytest.mark.parametrize(
    ("bound", "limits"),
    [
        (LengthBound(), [10, 12, 24, 90]),  # 2 n + 10
        (LengthBound(0.5, 30), [10, 12, 24, 90]),  # never less than that
        (LengthBound(3.0, 0), [10, 12, 24, 90]),  # a larger ratio is bound by the longest target
        (LengthBound(3.0, 18), [10, 13, 28, 90]),  # 3 n + 10, at most 18 + 10, at least 2 n + 10
        (LengthBound(3.0, 1000), [10, 13, 31, 130]),
        (LengthBound(2.3, 1000), [10, 13, 27, 102]),  # rounded up
        (LengthBound(math.inf, 18), [None, 28, 28, 90]),
    ],
)
def test_limits(bound: LengthBound, limits: list[int | None]) -> None:
    for length, expected in zip(LENGTHS.tolist(), limits, strict=True):
        if expected is not None:
            assert bound.limits(torch.tensor([length])).tolist() == [expected]


def test_limits_do_not_depend_on_the_defaults_of_torch() -> None:
    lengths, bound = torch.tensor([25, 26]), LengthBound(2.2, 999)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)  # 2.2 * 25 is more than 55 there
        with torch.device("meta"):
            found = bound.limits(lengths)
    finally:
        torch.set_default_dtype(before)
    assert found.device.type == "cpu"
    assert found.dtype == torch.int64
    assert found.tolist() == [65, 68]  # 57.2 is rounded up to 58
    assert bound.limits(lengths[:0]).tolist() == []
