"""How the time of a fused call scales with the number of threads, and with S, T, B and D."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from benchmarks.common import machine
from benchmarks.common.calls import Attend, call_of, copies_of, in_turn, inputs_of
from benchmarks.common.judging import judge_fused
from benchmarks.common.measure import Call, medians
from benchmarks.common.problems import Row
from benchmarks.common.sides import fused
from fused_attn.testing import Inputs

THREADS = (1, 2)
SIZES = {"S": "source", "T": "queries", "B": "batch", "D": "width"}
DOUBLINGS = 3
ROUNDS = 100


@dataclass(frozen=True)
class Scaled:
    """Seconds of a row by thread count, or by how often one of its sizes was doubled."""

    name: str
    passed: bool
    seconds: dict[int, float] = field(default_factory=dict)


def timed(
    row: Row, inputs: Inputs, *sides: Callable[[Row, Inputs], Attend], read_bytes: int = 0
) -> list[Call]:
    """The calls of ``sides`` on the same inputs, as they are timed.

    With ``read_bytes`` each call cycles through copies of the inputs of that total size: a share of
    the read bandwidth refers to memory that no cache holds.
    """
    every = copies_of(inputs, 1 + read_bytes // row.read_bytes)
    return [in_turn([call_of(row, each, side(row, each)) for each in every]) for side in sides]


def measure_threads(name: str, row: Row, budget_s: float) -> Scaled:
    """The row with one thread and with two, if there are two cores, taking turns."""
    counts = [count for count in THREADS if count <= machine.cores()]
    with machine.using_threads(counts[-1]):
        inputs = inputs_of(row)
        if not _is_right(row, inputs):
            return Scaled(name, passed=False)
        (call,) = timed(row, inputs, fused)
        calls = {str(count): call for count in counts}
        with torch.no_grad():
            found = medians(calls, budget_s, ROUNDS, before=lambda count: _use(int(count)))
    return Scaled(name, True, {int(count): s for count, s in found.items()})


def measure_growth(name: str, row: Row, axis: str, threads: int, budget_s: float) -> Scaled:
    """The row at its sizes and at three doublings of one of them, taking turns.

    ``axis`` is one of `SIZES`.
    """
    calls: dict[str, Call] = {}
    size = getattr(row.sizes, SIZES[axis])
    with machine.using_threads(threads):
        for doubling in range(DOUBLINGS + 1):
            larger = replace(row, sizes=row.sizes._replace(**{SIZES[axis]: size << doubling}))
            inputs = inputs_of(larger)
            if not _is_right(larger, inputs):
                return Scaled(name, passed=False)
            (calls[str(doubling)],) = timed(larger, inputs, fused)
        with torch.no_grad():
            found = medians(calls, budget_s, ROUNDS)
    return Scaled(name, True, {int(doubling): s for doubling, s in found.items()})


def _is_right(row: Row, inputs: Inputs) -> bool:
    return all(verdict.passed for verdict in judge_fused(row, inputs).values())


def _use(count: int) -> None:
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)
