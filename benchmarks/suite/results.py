"""A run of the suite: its records and their provenance, in a file and on a terminal."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

from benchmarks.common import machine
from benchmarks.common.files import ROOT, write_whole
from benchmarks.common.sides import EAGER
from benchmarks.common.table import WITHHELD, duration, render
from benchmarks.suite.measure import Limits, Record

FORMAT = 1
_BAR = 20  # characters


@dataclass(frozen=True)
class Run:
    """Everything that one run measured.

    provenance: date, processor, threads, versions, commit. limits: of the machine. growth: seconds
    after each doubling, by the name of a call and the size that was doubled. memory: peak bytes by
    side and source length. sizes: bytes of what is installed.
    """

    provenance: dict[str, Any]
    limits: Limits
    records: list[Record]
    growth: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the run; every row carries its provenance."""
        rows = [record.to_json() | {"provenance": self.provenance} for record in self.records]
        document = {
            "format": FORMAT,
            "provenance": self.provenance,
            "limits": {"read": self.limits.read, "peak": self.limits.peak},
            "rows": rows,
            "growth": self.growth,
            "memory": self.memory,
            "sizes": self.sizes,
        }
        write_whole(path, json.dumps(document, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read a run. Raises ValueError if the file is not one."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["format"] != FORMAT:
                raise ValueError(f"its format is {document['format']}, expected {FORMAT}")
            records = [Record.from_json(row) for row in document["rows"]]
            limits = Limits(**document["limits"])
            parts = (document[name] for name in ("growth", "memory", "sizes"))
            return cls(document["provenance"], limits, records, *parts)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a result of the suite: {error!r}") from None

    def by_case(self) -> dict[str, dict[str, Record]]:
        """The records by case and side, in the order of the run."""
        found: dict[str, dict[str, Record]] = {}
        for record in self.records:
            found.setdefault(record.id, {})[record.side] = record
        return found


def provenance(threads: int, device: str) -> dict[str, Any]:
    """The provenance of this run: the machine's, with the commit and the GPU."""
    facts = machine.provenance(threads) | {"commit": _commit(), "device": device}
    if device == "cuda":
        import torch

        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _commit() -> str:
    """The commit of the checkout, with a + if files differ from it."""
    try:
        commit, changed = (
            subprocess.run(
                ["git", *command], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changed else "")


def machine_name(facts: dict[str, Any]) -> str:
    """The directory of the machine: GPU, or processor and cores."""
    return machine.slug(facts.get("gpu") or f"{facts['processor']} {facts['cores']} cores")


def best_of_ours(sides: dict[str, Record]) -> Record | None:
    """The fastest of our sides that was right; if there is none, one that was wrong."""
    ours = [record for record in sides.values() if record.ours and not record.unable]
    found = _timed(ours) or ours
    return found[0] if found else None


def speedup(ours: Record | None, other: Record | None) -> float | None:
    """The time of the other over ours; None where one has no time."""
    if ours is None or other is None or ours.seconds is None or other.seconds is None:
        return None
    return other.seconds.median / ours.seconds.median


def rivals(sides: dict[str, Record]) -> list[Record]:
    """The sides that are not ours and have a time, the fastest first."""
    return _timed([record for record in sides.values() if not record.ours])


def _timed(records: list[Record]) -> list[Record]:
    timed = [(record.seconds.median, record) for record in records if record.seconds is not None]
    return [record for _, record in sorted(timed, key=itemgetter(0))]


def sizes_of(record: Record) -> str:
    """(B, T, S, D)."""
    return "(" + ", ".join(map(str, record.sizes.values())) + ")"


def score_of(record: Record) -> str:
    """The score as shown, with the dtype unless it is float32."""
    score = "concat, prepared" if record.score == "projected" else record.score
    return score if record.dtype == "float32" else f"{score}, {record.dtype}"


def text_of(run: Run) -> str:
    """The table for a terminal: our time, eager's, the best other, error, and a bar."""
    facts = run.provenance
    lines = [
        f"{facts.get('gpu') or facts['processor']}, threads: {facts['threads']}, "
        f"torch {facts['versions']['torch']}, {facts['date'][:10]}, commit {facts['commit']}",
        f"read {run.limits.read / 1e9:.0f} GB/s, multiply-adds {run.limits.peak / 1e9:.0f} GFLOP/s",
        "",
    ]
    rows = []
    for sides in run.by_case().values():
        rows.append(_row(sides))
    header = ["case", "score", "B, T, S, D", "", "ours", "eager", "", "best other", "", "error", ""]
    lines.append(render(header, rows, text_columns=4))
    wrong = [record for record in run.records if record.withheld]
    for record in wrong:
        lines += ["", f"WITHHELD: {record.side}, {record.id}: {', '.join(record.wrong)} wrong"]
    return "\n".join(lines)


def _row(sides: dict[str, Record]) -> list[str]:
    first = next(iter(sides.values()))
    ours, eager = best_of_ours(sides), sides.get(EAGER)
    others = rivals(sides)
    against, best = speedup(ours, eager), speedup(ours, others[0] if others else None)
    error = ""
    if ours is not None and ours.errors:
        error = f"{max(ours.errors.values()):.0e}"
    return [
        first.name,
        score_of(first),
        sizes_of(first),
        {"both": "fwd+bwd", "forward": "fwd"}.get(first.way, first.way),
        _time(ours),
        _time(eager),
        "" if against is None else f"{against:.2f}x",
        others[0].side if others else "",
        "" if best is None else f"{best:.2f}x",
        error,
        "" if against is None else bar(against),
    ]


def _time(record: Record | None) -> str:
    if record is None:
        return ""
    if record.withheld:
        return WITHHELD
    if record.seconds is None:
        return ""
    return f"{duration(record.seconds.median)} ±{record.seconds.spread:.0%}"


def bar(ratio: float) -> str:
    """The ratio to eager on a log scale, four characters for each doubling; ▒ if slower."""
    length = round(4 * math.log2(ratio))
    if length < 0:
        return "▒" * min(_BAR, -length) + "|"
    return ("|" + "█" * min(_BAR, length) + ("+" if length > _BAR else "")).ljust(_BAR + 2)


def cases_that_are_wrong(records: Sequence[Record]) -> list[Record]:
    """Our records that exceeded the error budget."""
    return [record for record in records if record.ours and record.wrong]
