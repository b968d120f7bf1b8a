"""Peak memory of one call of one side in a fresh process, in bytes: CASE SIDE DEVICE.

CASE is the id of a case, or SCORE:BxTxSxD for a training step of these sizes. A process that did
other work before has a peak of its own. On a CPU it reads /proc, so it needs Linux; what libraries
allocate on first use counts too, some megabytes.
"""

from __future__ import annotations

import sys

import torch

from benchmarks.common.calls import call_of, inputs_of, on_device
from benchmarks.common.peak_memory import allocated_growth, process_growth
from benchmarks.common.problems import Row, Sizes
from benchmarks.suite.cases import cases
from benchmarks.suite.sides import sides


def row_of(case_id: str) -> Row:
    """The call of a case."""
    score, separated, sizes = case_id.partition(":")
    if separated:
        return Row(score, Sizes(*map(int, sizes.split("x"))), backward=True)
    (case,) = (case for case in cases(quick=False) if case.id == case_id)
    return case.row


def growth(case_id: str, side_name: str, device: str) -> int:
    """Bytes at the peak of the call, above those before it."""
    row = row_of(case_id)
    (side,) = (side for side in sides(device) if side.name == side_name)
    inputs = on_device(inputs_of(row), device)
    call = call_of(row, inputs, side.make(row, inputs))
    with torch.set_grad_enabled(row.backward):
        if device == "cuda":
            call()  # what is allocated once, by a compiler or a library
            return allocated_growth(call)
        return process_growth(call)


if __name__ == "__main__":
    print(growth(*sys.argv[1:]))
