"""Growth of a fresh process over one call of one side, in bytes: CASE SIDE DEVICE.

CASE is the id of a case, or SCORE:BxTxSxD for a training step of those sizes. A process that did
other things before has a peak of its own. On a CPU it reads /proc, so Linux only; what libraries
allocate when they are first used counts too, some megabytes.
"""

from __future__ import annotations

import sys

import torch

from benchmarks.common.calls import call_of, inputs_of
from benchmarks.common.peak_memory import memory_of_process
from benchmarks.suite.cases import cases
from benchmarks.suite.measure import on_device
from benchmarks.suite.sides import sides
from benchmarks.targets.cpu.rows import Row, Sizes


def row_of(case_id: str) -> Row:
    """The call of a case."""
    score, separated, sizes = case_id.partition(":")
    if separated:
        return Row(score, Sizes(*map(int, sizes.split("x"))), score, backward=True)
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
            call()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        before = memory_of_process("VmRSS")
        call()
        return memory_of_process("VmHWM") - before


if __name__ == "__main__":
    print(growth(*sys.argv[1:]))
