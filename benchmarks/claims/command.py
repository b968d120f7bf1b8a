"""What attention is for, by experiment: the bottleneck, the vanishing gradient, alignments.

Models that differ only in their attention get the same data and the same number of steps. Each is
trained from several seeds. The figures are means, with the lowest and the highest seed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.claims import experiments
from benchmarks.claims.experiments import QUICK, Budget, Spread
from benchmarks.common import machine

DOCUMENT, PICTURE = "claims.md", "claims.svg"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks claims", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a run of a minute, as a check")
    parser.add_argument(
        "--output", type=Path, metavar="DIR",
        help=f"write {DOCUMENT}, {PICTURE} and claims.json there (default: print the tables)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    budget = QUICK if options.quick else Budget()
    started = time.monotonic()

    def tell(text: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {text}", flush=True)

    right, aligned = experiments.bottleneck(budget, tell)
    norms = experiments.vanishing(budget, tell)
    sampled = experiments.exposure(budget, tell)
    seconds = time.monotonic() - started
    text = document(budget, right, aligned, norms, sampled, seconds)
    if options.output is None:
        print(text)
        return 0
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / DOCUMENT).write_text(text, encoding="utf-8")
    draw(right, norms, options.output / PICTURE)
    values = {
        "provenance": machine.provenance(torch.get_num_threads()),
        "seconds": round(seconds),
        "right": {name: dict(spread.values) for name, spread in right.items()},
        "aligned": {name: dict(spread.values) for name, spread in aligned.items()},
        "gradient": {name: dict(spread.values) for name, spread in norms.items()},
        "sampling": {
            name: {place: dict(spread.values) for place, spread in spreads.items()}
            for name, spreads in sampled.items()
        },
    }
    (options.output / "claims.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
    return 0


def document(
    budget: Budget,
    right: Mapping[str, Spread],
    aligned: Mapping[str, Spread],
    norms: Mapping[str, Spread],
    sampled: Mapping[str, Mapping[str, Spread]],
    seconds: float,
) -> str:
    """Return the tables as Markdown."""
    lines = [
        *_head(budget, seconds),
        "## The bottleneck: correct symbols by source length, %",
        "",
        "Without attention one state has to hold the whole source. Reading the source backwards "
        "brings its first symbols close to where they are needed (Sutskever et al. 2014).",
        "",
        *_table("length up to", right, lambda value: f"{100 * value:.1f}"),
        "",
        "## The vanishing gradient: gradient norm at the first source symbol",
        "",
        "The table shows the gradient of the first target symbol's loss with respect to the first "
        "source symbol's embedding, in untrained models, by source length. Without attention the "
        "gradient has to pass through every step between these two symbols.",
        "",
        *_table("length", norms, lambda value: f"{value:.1e}", spread=False),
        "",
        "## Alignment: symbols whose largest weight lies on their own source symbol, %",
        "",
        "| score | aligned |",
        "|---|---|",
        *(
            f"| {name} | {_cell(spread.rows()[0], lambda value: f'{100 * value:.1f}')} |"
            for name, spread in aligned.items()
        ),
        "",
        "## Teacher forcing against scheduled sampling",
        "",
        "In this task one wrong symbol makes all later ones wrong. The table shows the correct "
        "symbols, in %, when the decoder is fed the correct previous symbols and when it is fed "
        "its own. The gap is the exposure bias.",
        "",
        "| scheduled sampling | fed correct ones | fed its own | gap |",
        "|---|---|---|---|",
        *(
            f"| {name} | "
            + " | ".join(
                _cell(spread.rows()[0], lambda value: f"{100 * value:.1f}")
                for spread in spreads.values()
            )
            + " |"
            for name, spreads in sampled.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def _head(budget: Budget, seconds: float) -> list[str]:
    """The heading: what was run, and where."""
    seeds = len(budget.seeds)
    where = machine.provenance(0)["processor"]
    count = torch.get_num_threads()
    threads = "one thread" if count == 1 else f"{count} threads"
    return [
        "# What attention is for, by experiment",
        "",
        f"`python -m benchmarks claims --output docs`: {seeds} seeds, {seconds / 60:.0f} minutes "
        f"on {threads} of {where}. Every model is a unidirectional GRU of width 64, trained for "
        f"{budget.epochs} epochs to copy {budget.pairs:,} sequences of 1 to {budget.longest} "
        "symbols. The models differ only in their attention. Figures are means over the seeds, "
        "with the lowest and the highest in brackets.",
        "",
        f"![Correct symbols by length, and gradients by distance]({PICTURE})",
        "",
    ]


def _table(
    head: str, spreads: Mapping[str, Spread], shown: Any, *, spread: bool = True
) -> list[str]:
    places = [row[0] for row in next(iter(spreads.values())).rows()]
    lines = [
        f"| {head} | " + " | ".join(map(str, places)) + " |",
        "|---" * (len(places) + 1) + "|",
    ]
    for name, values in spreads.items():
        cells = [_cell(row, shown) if spread else shown(row[1]) for row in values.rows()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _cell(row: tuple[int, float, float, float], shown: Any) -> str:
    _, mean, low, high = row
    return f"{shown(mean)} ({shown(low)}..{shown(high)})"


def draw(right: Mapping[str, Spread], norms: Mapping[str, Spread], path: Path) -> None:
    """Write the picture: the first two tables as lines, with the range of the seeds."""
    from matplotlib.figure import Figure

    from benchmarks.common.pictures import METADATA, reproducible

    with reproducible():
        figure = Figure(figsize=(9, 4), layout="constrained")
        axes = figure.subplots(1, 2)
        for place, spreads in zip(axes, (right, norms), strict=True):
            factor = 100 if place is axes[0] else 1
            for name, spread in spreads.items():
                x, mean, low, high = zip(*spread.rows(), strict=True)
                place.plot(x, [factor * y for y in mean], marker=".", label=name)
                place.fill_between(
                    x, [factor * y for y in low], [factor * y for y in high], alpha=0.15
                )
            place.grid(alpha=0.3)
        axes[0].set(xlabel="source length", ylabel="correct symbols, %", ylim=(0, 102))
        axes[1].set(
            xlabel="distance to the first source symbol", ylabel="gradient norm", yscale="log"
        )
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
        figure.savefig(path, metadata=METADATA)
