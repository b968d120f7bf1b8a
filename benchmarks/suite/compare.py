"""Two runs of the suite, or a run and the baseline of its machine: what changed beyond the noise.

    python -m benchmarks compare A.json B.json     times of the same calls
    python -m benchmarks compare B.json            ratios to eager, against the machine's baseline

A baseline holds ratios to eager: on a slow day of a shared machine, eager is slow too.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.files import RESULTS, write_whole
from benchmarks.common.sides import EAGER
from benchmarks.common.table import render
from benchmarks.suite.results import (
    Run,
    best_of_ours,
    machine_name,
    speedup,
)

BASELINE = "baseline.json"
# A ratio is worse if it fell by more than this, and by more than twice the combined spread.
TOLERANCE = 0.15


@dataclass(frozen=True)
class Change:
    """A figure in both runs. factor: above 1 the second is better. noise: combined, a share."""

    name: str
    before: float
    after: float
    factor: float
    noise: float

    @property
    def worse(self) -> bool:
        """Whether it fell by more than tolerance and noise."""
        return self.factor < 1 / (1 + max(TOLERANCE, 2 * self.noise))

    @property
    def better(self) -> bool:
        return self.factor > 1 + max(TOLERANCE, 2 * self.noise)

    @property
    def verdict(self) -> str:
        return "WORSE" if self.worse else "better" if self.better else ""


def times(before: Run, after: Run) -> list[Change]:
    """The change of every call that has a time in both runs."""
    found = []
    theirs = {(record.id, record.side): record for record in before.records}
    for record in after.records:
        other = theirs.get((record.id, record.side))
        if other is None or other.seconds is None or record.seconds is None:
            continue
        a, b = other.seconds, record.seconds
        noise = math.hypot(a.spread, b.spread)
        name = f"{record.id} {record.side}"
        found.append(Change(name, a.median, b.median, a.median / b.median, noise))
    return found


def ratios(run: Run) -> dict[str, tuple[float, float]]:
    """The ratio of eager to ours by case, with the noise of the ratio."""
    found = {}
    for case, sides in run.by_case().items():
        ours, eager = best_of_ours(sides), sides.get(EAGER)
        ratio = speedup(ours, eager)
        if ratio is not None and ours and eager and ours.seconds and eager.seconds:
            found[case] = ratio, math.hypot(ours.seconds.spread, eager.seconds.spread)
    return found


def against_baseline(baseline: dict[str, list[float]], run: Run) -> list[Change]:
    """The change of every ratio that the baseline has too."""
    found = []
    for case, (ratio, noise) in ratios(run).items():
        if case in baseline:
            before, spread = baseline[case]
            found.append(Change(case, before, ratio, ratio / before, math.hypot(noise, spread)))
    return found


def baseline_path(run: Run) -> Path:
    """The baseline of the machine of a run."""
    return RESULTS / machine_name(run.provenance) / BASELINE


def load_baseline(path: Path) -> dict[str, list[float]]:
    """The ratios of a baseline; empty if there is no such file."""
    if not path.exists():
        return {}
    return dict(json.loads(path.read_text(encoding="utf-8"))["ratios"])


def save_baseline(run: Run, path: Path) -> None:
    """Make the ratios of a run the baseline; cases that the run lacks are kept."""
    kept = load_baseline(path) | {case: list(found) for case, found in ratios(run).items()}
    document = {"provenance": run.provenance, "ratios": dict(sorted(kept.items()))}
    write_whole(path, json.dumps(document, indent=1) + "\n")


def text_of(changes: Sequence[Change], *, seconds: bool) -> str:
    """A table of the changes, the worst first."""
    rows = []
    for change in sorted(changes, key=lambda change: change.factor):
        if change.verdict:
            unit = "{:.3g} s" if seconds else "{:.2f}x"
            values = [unit.format(value) for value in (change.before, change.after)]
            noise = f"±{change.noise:.0%}"
            rows.append([change.name, *values, f"{change.factor:.2f}x", noise, change.verdict])
    same = len(changes) - len(rows)
    ending = f"{same} of {len(changes)} figures are the same within {TOLERANCE:.0%} and the noise"
    if not rows:
        return ending
    header = ["figure", "before", "after", "change", "noise", ""]
    return f"{render(header, rows)}\n{ending}"


def check(run: Run) -> int:
    """Compare a run with its machine's baseline and print it. Returns 1 if a ratio got worse."""
    path = baseline_path(run)
    baseline = load_baseline(path)
    if not baseline:
        print(f"\nno baseline for this machine: `compare A.json --baseline` writes {path}")
        return 0
    changes = against_baseline(baseline, run)
    print(f"\nagainst the baseline, ours to eager:\n{text_of(changes, seconds=False)}")
    return 1 if any(change.worse for change in changes) else 0


def main(arguments: Sequence[str]) -> int:
    """Compare, and return 1 if something got worse."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compare", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("first", type=Path, metavar="A", help="a file of results")
    parser.add_argument("second", type=Path, nargs="?", metavar="B", help="another, newer")
    parser.add_argument(
        "--baseline", action="store_true", help="make A the baseline of its machine"
    )
    options = parser.parse_args(arguments)
    try:
        first = Run.load(options.first)
        second = None if options.second is None else Run.load(options.second)
    except (OSError, ValueError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    if options.baseline:
        save_baseline(first, baseline_path(first))
        print(f"written: {baseline_path(first)}")
        return 0
    if second is None:
        return check(first)
    changes = times(first, second)
    if not changes:
        print("compare: the runs have no call in common", file=sys.stderr)
        return 2
    print(text_of(changes, seconds=True))
    return 1 if any(change.worse for change in changes) else 0
