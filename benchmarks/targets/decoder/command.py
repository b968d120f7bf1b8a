"""The native decoder against a loop over LSTMCell, AttnLSTM, g2p_en's model and the machine.

Each row's results are judged first, against float64 or against the torch path. Then all sides take
turns, and with them the yardsticks of the machine: a read of a buffer as large as the weights, and
multiply-adds in registers. The floor of a row is the larger of its bytes over that bandwidth and
its multiply-adds over that peak; products in bfloat16 count half and those in int8 a quarter, where
the processor has instructions for them. Reads of the memory, the embedding and the search are not
in the floor.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import machine
from benchmarks.common.files import write_whole
from benchmarks.common.table import WITHHELD, duration, progress, render
from benchmarks.targets.decoder import measure, words
from benchmarks.targets.decoder.figures import Result, as_json, verdicts
from benchmarks.targets.decoder.floors import peak_factors
from benchmarks.targets.decoder.rows import (
    ATTN_LSTM,
    BUSY_BATCHES,
    COMPILED,
    G2P,
    LOOP,
    ONE_THREAD,
    OURS,
    SEARCH_ROWS,
    SHORT,
    STEP_ROWS,
    THREAD_BATCHES,
    TORCH,
    TWO_THREADS,
    WORD_ROWS,
    SearchRow,
    Sizes,
    StepRow,
    WordRow,
)
from fused_attn import backends

RIVALS = (LOOP, COMPILED, ATTN_LSTM, TORCH, G2P)
HEADER = ["case", "type", OURS, "floor", "of floor", *RIVALS, "verdict"]


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    steps: Sequence[StepRow] = STEP_ROWS
    searches: Sequence[SearchRow] = SEARCH_ROWS
    words: Sequence[WordRow] = WORD_ROWS
    threads: Sequence[int] = THREAD_BATCHES
    busy: Sequence[int] = BUSY_BATCHES
    sizes: Sizes = field(default_factory=Sizes)

    def only(self, text: str) -> Plan:
        """The part whose labels contain ``text``, in any case."""

        def wanted(label: str) -> bool:
            return text.lower() in label.lower()

        return Plan(
            [row for row in self.steps if wanted(row.label)],
            [row for row in self.searches if wanted(row.label)],
            [row for row in self.words if wanted(row.label)],
            [batch for batch in self.threads if wanted(f"general, B={batch}, threads")],
            [batch for batch in self.busy if wanted(f"general, B={batch}, busy")],
            self.sizes,
        )

    @property
    def is_empty(self) -> bool:
        return not (self.steps or self.searches or self.words or self.threads or self.busy)


def results(plan: Plan, budget_s: float, path: Path | None) -> Iterator[Result]:
    """Measure the plan, with one thread unless a row says otherwise, and show what is measured."""
    with machine.using_threads(1):
        for row in plan.steps:
            progress(row.label)
            yield from measure.measure_steps(row, plan.sizes, 1, budget_s)
        for search in plan.searches:
            progress(search.label)
            yield measure.measure_search(search, plan.sizes, budget_s)
        if plan.words:
            progress("loading the bundled model")
            models, every = words.Models.load(), words.word_list(path, words.BATCHED)
        for word in plan.words:
            progress(word.label)
            yield words.measure_words(word, models, every, budget_s)
        beside: list[tuple[Callable[..., Result], Sequence[int]]] = [
            (measure.measure_threads, plan.threads),
            (measure.measure_busy, plan.busy),
        ]
        for measured, batches in beside:
            for batch in batches:
                progress(f"{measured.__name__.removeprefix('measure_')}, B={batch}")
                yield measured(batch, plan.sizes, budget_s)
    progress("")


def table_row(result: Result) -> list[str]:
    """The cells under `HEADER`. Beside a rival's time stands how many times as fast ours is."""
    floor = result.floor
    share = "" if floor is None or result.ours is None else f"{result.ours / floor.seconds:.2f}x"
    cells = []
    for name in RIVALS:
        seconds, ratio = result.seconds.get(name), result.speedup(name)
        text = "not here" if name in result.missing else ""
        text = WITHHELD if name in result.wrong else text
        if seconds is not None:
            text = duration(seconds) + ("" if ratio is None else f" {ratio:.2f}x")
        cells.append(text)
    ours = (
        WITHHELD if OURS in result.wrong else "" if result.ours is None else duration(result.ours)
    )
    shown = "" if floor is None else duration(floor.seconds)
    return [result.label, SHORT[result.compute], ours, shown, share, *cells, result.verdict]


def endings(found: Sequence[Result]) -> list[str]:
    """The figures with targets, the results that were wrong, and the sides that did not run."""
    targets = [
        f"  {result.label}, {SHORT[result.compute]}: {line}"
        for result in found
        for line in verdicts(result)
    ]
    wrong = [
        f"  {result.label}, {SHORT[result.compute]}: error of {side} "
        f"{result.errors[side][0]:.2g}, limit {result.errors[side][1]:.2g}"
        for result in found
        for side in result.wrong
    ]
    missing = [
        f"  {result.label}, {SHORT[result.compute]}: {side}: {reason}"
        for result in found
        for side, reason in result.missing.items()
    ]
    two = [
        f"  {result.label}, {SHORT[result.compute]}: {duration(result.beside[TWO_THREADS])}, "
        f"with one {duration(result.beside[ONE_THREAD])}"
        for result in found
        if TWO_THREADS in result.beside
    ]
    parts = {
        "With two threads": two,
        "Targets": targets,
        "WITHHELD, because results were wrong": wrong,
        "Not measured here": missing,
    }
    return [line for title, lines in parts.items() if lines for line in ("", title, *lines)]


def _limits(found: Sequence[Result]) -> list[str]:
    """The bandwidths and the peak that the floors were computed from."""
    floors = [(result, result.floor) for result in found if result.floor is not None]
    return [
        f"  {result.label}, {SHORT[result.compute]}: {floor.bandwidth / 1e9:.0f} GB/s, "
        f"{2 * floor.peak / 1e9:.0f} G operations/s: "
        f"{duration(floor.reading)} of reads, {duration(floor.multiplying)} of multiply-adds"
        for result, floor in floors
    ]


def text(provenance: dict[str, Any], found: Sequence[Result]) -> str:
    """The report as text: the table, the limits of the machine, targets, wrong results."""
    factors = ", ".join(f"{SHORT[name]} {factor}x" for name, factor in peak_factors().items())
    load = " and ".join(f"{value:.1f}" for value in provenance["load"])
    busy = ": BUSY, so trust no time and no verdict" if max(provenance["load"]) > 0.5 else ""
    lines = [
        f"{provenance['processor']}, {provenance['instruction_set']}, one thread, "
        f"torch {provenance['versions']['torch']}, {provenance['date'][:10]}",
        f"processes running before and after: {load}{busy}",
        f"multiply-adds in the time of one in fp32: {factors}",
        "times per step of all rows, per search, or per word; g2p_en's model has random weights",
        "",
        render(HEADER, [table_row(result) for result in found], text_columns=2),
    ]
    limits = _limits(found)
    lines += ["", "The machine in the same rounds", *limits] if limits else []
    return "\n".join([*lines, *endings(found)])


def main(arguments: Sequence[str] = (), plan: Plan | None = None) -> int:
    """Print the tables. Returns 1 if a result was wrong, 2 without the backend."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks decoder", description=summary)
    parser.add_argument("--rows", default="", metavar="TEXT", help="only rows that contain it")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="about, for each row (default: 2)"
    )
    parser.add_argument(
        "--words",
        type=Path,
        metavar="PATH",
        help="a word on each line (default: the published test words if they lie beside this "
        "checkout, else words of the CMU dictionary)",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures there")
    options = parser.parse_args(arguments)
    chosen = (plan or Plan()).only(options.rows)
    if chosen.is_empty:
        parser.error(f"no row has {options.rows!r} in its label")
    if options.words is not None and not options.words.is_file():
        parser.error(f"--words: {options.words} is not a file")
    if reasons := backends.unavailable_reasons("cpu"):
        print(f"the cpu backend is not usable: {'; '.join(reasons)}", file=sys.stderr)
        return 2
    before = os.getloadavg()[0]
    found = list(results(chosen, options.seconds, options.words))
    provenance = machine.provenance(1) | {"load": [before, os.getloadavg()[0]]}
    print(text(provenance, found))
    if options.json:
        document = {"provenance": provenance, "rows": [as_json(result) for result in found]}
        write_whole(options.json, json.dumps(document, indent=1) + "\n")
    return 1 if any(result.wrong for result in found) else 0
