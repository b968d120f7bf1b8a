"""The measured rows: times of every side, the floor, and what became of each target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.common.table import WITHHELD
from benchmarks.targets.decoder.floors import Floor
from benchmarks.targets.decoder.rows import ONE_THREAD, OURS, TWO_THREADS, Target


@dataclass(frozen=True)
class Result:
    """A row in one type of the products.

    seconds: by side; per step of all rows, per search, or per word. beside: seconds of our side in
    other settings: "one thread", "two threads", "quiet", "busy". errors: by side, with the limit.
    missing: by side, why it cannot run here.
    """

    label: str
    compute: str
    seconds: Mapping[str, float]
    targets: Sequence[Target] = ()
    floor: Floor | None = None
    beside: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)

    @property
    def wrong(self) -> list[str]:
        """The sides whose results are wrong, which have no time."""
        return [side for side, (error, limit) in self.errors.items() if not error <= limit]

    @property
    def ours(self) -> float | None:
        return self.seconds.get(OURS)

    def speedup(self, rival: str) -> float | None:
        """How many times as fast as a rival our side is."""
        theirs = self.seconds.get(rival)
        return None if self.ours is None or theirs is None else theirs / self.ours

    def value(self, target: Target) -> float | None:
        """The figure that a target limits; None if it was not measured."""
        beside = self.beside
        if target.kind == "threads":
            pair = beside.get(ONE_THREAD), beside.get(TWO_THREADS)
            return pair[0] / pair[1] if pair[0] and pair[1] else None
        if target.kind == "busy":
            pair = beside.get("busy"), beside.get("quiet")
            return pair[0] / pair[1] if pair[0] and pair[1] else None
        if target.kind == "speedup":
            return self.speedup(target.rival)
        if self.ours is None:
            return None
        if target.kind == "floors":
            return None if self.floor is None else self.ours / self.floor.seconds
        if target.kind == "peak":
            return None if self.floor is None else self.floor.multiplying / self.ours
        return self.ours if target.kind == "seconds" else 1 / self.ours

    def short(self) -> list[Target]:
        """The targets that were measured and not met."""
        values = ((target, self.value(target)) for target in self.targets)
        return [target for target, value in values if value is not None and not target.met(value)]

    @property
    def verdict(self) -> str:
        if OURS in self.wrong:
            return WITHHELD
        if OURS in self.missing:
            return "not here"
        if not self.targets:
            return ""
        if any(self.value(target) is None for target in self.targets):
            return "incomplete"
        return "SHORT" if self.short() else "ok"


def text_of(target: Target, value: float | None = None) -> str:
    """A target, or a value that it limits, as text: "1.8x", "1.4 floors", "75% of peak"."""
    shown = target.value if value is None else value
    sign = "" if value is not None else ("<= " if target.is_most else ">= ")
    if target.kind == "seconds":
        return f"{sign}{shown * 1e3:.3g} ms"
    if target.kind == "rate":
        return f"{sign}{shown:,.0f} words/s"
    if target.kind == "peak":
        return f"{sign}{shown:.0%} of peak"
    if target.kind == "floors":
        return f"{sign}{shown:.3g} floors"
    if target.kind == "busy":
        return f"{sign}{shown:.3g}x quiet"
    against = target.rival if target.kind == "speedup" else ONE_THREAD
    return f"{sign}{shown:.3g}x {against}"


def verdicts(result: Result) -> Iterator[str]:
    """Every figure with its target: "1.52 floors (<= 1.4) SHORT"."""
    for target in result.targets:
        value = result.value(target)
        if value is not None:
            ending = "" if target.met(value) else " SHORT"
            yield f"{text_of(target, value)} ({text_of(target)}){ending}"


def as_json(result: Result) -> dict[str, Any]:
    """The row as plain values, under the names of `Result`."""
    return {
        "label": result.label,
        "compute": result.compute,
        "verdict": result.verdict,
        "seconds": dict(result.seconds),
        "beside": dict(result.beside),
        "missing": dict(result.missing),
        "errors": {
            side: {"error": error, "limit": limit} for side, (error, limit) in result.errors.items()
        },
        "floor": result.floor and asdict(result.floor),
        "targets": [
            {**asdict(target), "measured": result.value(target)} for target in result.targets
        ],
    }
