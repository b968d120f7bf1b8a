"""One case of the suite: every side is judged first, and then those that are right take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from benchmarks.common import machine
from benchmarks.common.calls import Attend, Part, call_of, eager, inputs_of, results, verdict_of
from benchmarks.common.measure import Call, samples
from benchmarks.suite.cases import Case
from benchmarks.suite.sides import Side, Unable
from fused_attn import testing
from fused_attn.testing import Inputs, Tensors

ROUNDS = 60
GIGA = 1e9


@dataclass(frozen=True)
class Timing:
    """Seconds of a call: the median of its runs, and the quarters beside it."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Of at least three runs."""
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, low, high, len(seconds))

    @property
    def spread(self) -> float:
        """Half of what lies between the quarters, as a part of the median."""
        return (self.high - self.low) / 2 / self.median


@dataclass(frozen=True)
class Record:
    """What one side did in one case.

    seconds: None if it is withheld, because a result was wrong, or the side cannot do it.
    errors: of the context and each gradient against float64, as parts of the largest value.
    wrong: the results that exceeded the error budget.
    unable: why there is nothing, if this side has no such call.
    first_call: seconds of the first call in this process, compilation included.
    peak_bytes: what the process grew by over the call; None if that was not measured.
    read_share, peak_share: of the machine's measured read bandwidth and multiply-adds, of a
        forward call by its least traffic and least work.
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
    tokens: int | None = None  # of a call, where tokens a second are what counts

    @property
    def withheld(self) -> bool:
        """Whether there is no speed because a result was wrong."""
        return bool(self.wrong)

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Record:
        """The record of `to_json`."""
        known = {name: value for name, value in values.items() if name in cls.__annotations__}
        seconds = known.get("seconds")
        known["seconds"] = None if seconds is None else Timing(**seconds)
        known["wrong"] = tuple(known.get("wrong", ()))
        return cls(**known)


@dataclass(frozen=True)
class Limits:
    """What the machine can do, measured: bytes read and operations, a second."""

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


def synchronised(call: Callable[[], object]) -> Call:
    """The call, and all that it has begun on the GPU."""

    def wait() -> None:
        call()
        torch.cuda.synchronize()

    return wait


def on_device(inputs: Inputs, device: str) -> Inputs:
    """The same inputs there."""
    if device == "cpu":
        return inputs
    tensors = {name: tensor.to(device) for name, tensor in inputs.tensors.items()}
    lengths = inputs.masking.memory_lengths
    masking = inputs.masking._replace(
        memory_lengths=None if lengths is None else lengths.to(device)
    )
    grad = inputs.grad_context.to(device)
    return replace(inputs, tensors=tensors, masking=masking, grad_context=grad)


def measure_case(
    case: Case, sides: Sequence[Side], device: str, limits: Limits, budget_s: float
) -> list[Record]:
    """A record for each side; those whose results are right have a time."""
    row = case.row
    inputs = on_device(inputs_of(row), device)
    blank = Record(
        case.id, "operator", case.name, case.origin, row.score,
        str(row.dtype).removeprefix("torch."), row.sizes._asdict(),
        "both" if row.backward else "forward", "", False,
    )  # fmt: skip
    judge = Judge(case, inputs)
    if any(side.slow for side in sides):
        torch.compiler.reset()  # it gives up on a function that it has compiled eight times
    records: dict[str, Record] = {}
    attends: dict[str, Attend] = {}
    for side in sides:
        record = replace(blank, side=side.name, ours=side.ours)
        try:
            attend = side.make(row, inputs)
            record = judge.judged(record, attend)
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
                records[name] = _with_time(records[name], Timing.of(seconds), case, limits)
    return list(records.values())


def _with_time(record: Record, timing: Timing, case: Case, limits: Limits) -> Record:
    row = case.row
    if row.backward:
        return replace(record, seconds=timing)
    least = row.read_bytes if row.sizes.queries == 1 else row.problem.bytes()
    return replace(
        record,
        seconds=timing,
        read_share=least / timing.median / limits.read,
        peak_share=row.problem.flops() / timing.median / limits.peak,
    )


class Judge:
    """Holds what a side returns against float64, with the eager chain as the yardstick."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.row = case.row
        self.at = Part.of(case.row)
        part = self.at.inputs(inputs)
        seed = torch.zeros_like(inputs.grad_context)
        self.at.take("context", seed).copy_(part.grad_context)
        self.whole = replace(inputs, grad_context=seed)
        self.oracle = testing.oracle(part)
        self.plain = results(case.row, part, eager(case.row, part))

    def judged(self, record: Record, attend: Attend) -> Record:
        """The record with its errors and the time of the first call.

        Raises `Unable` if the side fails: what a compiler or a library refuses, it says itself.
        """
        start = time.perf_counter()
        try:
            got: Tensors = results(self.row, self.whole, attend)
            if self.whole.grad_context.device.type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:  # of whatever kind theirs are
            if record.ours:
                raise
            text = str(error).strip() or type(error).__name__
            raise Unable(f"it fails: {text.splitlines()[0][:120]}") from None
        first = time.perf_counter() - start
        verdicts = {
            name: verdict_of(name, self.at, got, self.oracle, self.plain) for name in self.oracle
            if name in got
        }  # fmt: skip
        errors = {name: v.error / (v.largest or 1.0) for name, v in verdicts.items()}
        wrong = tuple(name for name, verdict in verdicts.items() if not verdict.passed)
        return replace(record, errors=errors, wrong=wrong, first_call=first)
