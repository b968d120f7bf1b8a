"""The operator cases for pytest-benchmark: ``pytest benchmarks``, ``--benchmark-compare``.

    pytest benchmarks -k "greedy and dot" --benchmark-group-by=param:case
    pytest benchmarks --benchmark-save=before        # then, after a change
    pytest benchmarks --benchmark-compare=0001

A side whose results are wrong fails and has no time.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.common.calls import call_of, inputs_of, on_device, synchronised
from benchmarks.common.judging import Judge
from benchmarks.suite.cases import Case, cases
from benchmarks.suite.measure import Record, judged
from benchmarks.suite.sides import Side, Unable, sides

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLANK = Record("", "operator", "", "", "", "", {}, "", "", False)


@pytest.mark.parametrize("side", [s for s in sides(DEVICE) if not s.slow], ids=lambda s: s.name)
@pytest.mark.parametrize("case", cases(quick=True), ids=lambda case: case.id)
def test_operator(benchmark: Any, case: Case, side: Side) -> None:
    inputs = on_device(inputs_of(case.row), DEVICE)
    try:
        attend = side.make(case.row, inputs)
        found = judged(BLANK, Judge(case.row, inputs), attend)
    except Unable as reason:
        pytest.skip(str(reason))
    assert not found.wrong, f"{found.wrong} exceeded the error budget: {found.errors}"
    benchmark.extra_info.update(found.errors)
    call = call_of(case.row, inputs, attend)
    with torch.set_grad_enabled(case.row.backward):
        benchmark(call if DEVICE == "cpu" else synchronised(call))
