"""One case of the suite: every side is judged first, then those that are right take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from benchmarks.common import machine
from benchmarks.common.calls import Attend, call_of, inputs_of, on_device, synchronised
from benchmarks.common.judging import Judge, relative_errors, wrong_names
from benchmarks.common.measure import Call, samples
from benchmarks.common.problems import Row, dtype_name
from benchmarks.suite.cases import Case
from benchmarks.suite.sides import Side, Unable

ROUNDS = 60


@dataclass(frozen=True)
class Timing:
    """Seconds of a call: the median of its runs and the quartiles beside it."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """The timing of at least three runs."""
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, low, high, len(seconds))

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        return (self.high - self.low) / 2 / self.median


@dataclass(frozen=True)
class Record:
    """What one side did in one case.

    seconds: None if a result was wrong, so that the time is withheld, or the side is unable.
    errors: of the context and each gradient against float64, as shares of the largest value.
    wrong: the results that exceeded the error budget.
    unable: why this side cannot compute the case; empty if it can.
    first_call: seconds of the first call in this process, including compilation.
    peak_bytes: growth of the process over the call; None if it was not measured.
    read_share, peak_share: what a forward call reads and computes at least, as a share of the
        machine's measured read bandwidth and multiply-adds.
    tokens: tokens per call, if the figure is tokens per second.
    """

    id: str
    level: str
    name: str
    origin: str
    score: str
    dtype: str
    sizes: Mapping[str, int]
    way: str
    side: str
    ours: bool
    seconds: Timing | None = None
    errors: Mapping[str, float] = field(default_factory=dict)
    wrong: tuple[str, ...] = ()
    unable: str = ""
    first_call: float | None = None
    peak_bytes: int | None = None
    read_share: float | None = None
    peak_share: float | None = None
    tokens: int | None = None

    @property
    def withheld(self) -> bool:
        """Whether the time is withheld because a result was wrong."""
        return bool(self.wrong)

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Record:
        """The inverse of `to_json`; unknown fields are ignored."""
        known = {name: value for name, value in values.items() if name in cls.__annotations__}
        seconds = known.get("seconds")
        known["seconds"] = None if seconds is None else Timing(**seconds)
        known["wrong"] = tuple(known.get("wrong", ()))
        return cls(**known)


@dataclass(frozen=True)
class Limits:
    """What the machine does at best, measured: bytes read and operations, per second."""

    read: float
    peak: float


def measure_limits(device: str, threads: int) -> Limits:
    """Measure the machine for about a second."""
    if device == "cuda":
        return _gpu_limits()
    call, operations = machine.peak_call(threads)
    found = samples({"read": machine.read_call(), "peak": call}, 1.0)
    read, peak = (min(found[name]) for name in ("read", "peak"))
    return Limits(machine.READ_BYTES / read, operations / peak)


def _gpu_limits() -> Limits:
    large = torch.ones(1 << 28, device="cuda")
    square = torch.randn(4096, 4096, device="cuda")
    calls = {"read": large.sum, "peak": lambda: square @ square}
    found = samples({name: synchronised(call) for name, call in calls.items()}, 1.0)
    return Limits(large.nbytes / min(found["read"]), 2 * 4096**3 / min(found["peak"]))


def measure_case(
    case: Case, sides: Sequence[Side], device: str, limits: Limits, budget_s: float
) -> list[Record]:
    """A record for each side; those whose results are right have a time."""
    row = case.row
    inputs = on_device(inputs_of(row), device)
    blank = Record(
        case.id, "operator", case.name, case.origin, row.score,
        dtype_name(row.dtype), row.sizes._asdict(),
        "both" if row.backward else "forward", "", False,
    )  # fmt: skip
    judge = Judge(row, inputs)
    if any(side.slow for side in sides):
        torch.compiler.reset()  # torch stops recompiling a function after eight times
    records: dict[str, Record] = {}
    attends: dict[str, Attend] = {}
    for side in sides:
        record = replace(blank, side=side.name, ours=side.ours)
        try:
            attend = side.make(row, inputs)
            record = judged(record, judge, attend)
        except Unable as reason:
            records[side.name] = replace(record, unable=str(reason))
            continue
        records[side.name] = record
        if not record.wrong:
            attends[side.name] = attend
    calls: dict[str, Call] = {
        name: call_of(row, inputs, attend) for name, attend in attends.items()
    }
    if device == "cuda":
        calls = {name: synchronised(call) for name, call in calls.items()}
    if calls:
        with torch.set_grad_enabled(row.backward):
            for name, seconds in samples(calls, budget_s, ROUNDS).items():
                records[name] = _with_time(records[name], Timing.of(seconds), row, limits)
    return list(records.values())


def _with_time(record: Record, timing: Timing, row: Row, limits: Limits) -> Record:
    if row.backward:
        return replace(record, seconds=timing)
    least = row.read_bytes if row.sizes.queries == 1 else row.problem.bytes()
    return replace(
        record,
        seconds=timing,
        read_share=least / timing.median / limits.read,
        peak_share=row.problem.flops() / timing.median / limits.peak,
    )


def judged(record: Record, judge: Judge, attend: Attend) -> Record:
    """The record with its errors and the time of the first call.

    Raises `Unable`, with the first line of the error, if a side that is not ours fails.
    """
    start = time.perf_counter()
    try:
        got = judge.results(attend)
        if judge.whole.grad_context.device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # compilers and libraries raise anything
        if record.ours:
            raise
        text = str(error).strip() or type(error).__name__
        raise Unable(f"it fails: {text.splitlines()[0][:120]}") from None
    first = time.perf_counter() - start
    verdicts = judge.verdicts(got)
    errors, wrong = relative_errors(verdicts), wrong_names(verdicts)
    return replace(record, errors=errors, wrong=wrong, first_call=first)
