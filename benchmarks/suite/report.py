"""Results of the suite as one HTML page, and as the table of the README.

python -m benchmarks report benchmarks/results/MACHINE/DATE.json --output page.html
python -m benchmarks report benchmarks/results/MACHINE/DATE.json --readme README.md
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

from benchmarks.common.files import write_whole
from benchmarks.common.sides import EAGER
from benchmarks.common.table import WITHHELD, duration
from benchmarks.suite.measure import Record
from benchmarks.suite.pictures import (
    growth_picture,
    growth_table,
    memory_picture,
    roofline,
    speedup_picture,
)
from benchmarks.suite.results import (
    Run,
    best_of_ours,
    rivals,
    score_of,
    sizes_of,
    speedup,
)
from benchmarks.suite.run import short_cases

TEMPLATE = Path(__file__).with_name("report.html")
BEGIN, END = "<!-- suite: written by `python -m benchmarks report` -->", "<!-- /suite -->"
LEVELS = {
    "operator": "The operator: score, mask, softmax, weighted sum",
    "layer": "The layer: with projections and attentional state",
    "model": "Whole models: symbols per second",
}
PICTURES = {
    "speedup": speedup_picture, "roofline": roofline, "memory": memory_picture,
    "growth": growth_picture,
}  # fmt: skip
WAYS = {"both": "forward + backward", "forward": "forward"}


def page(run: Run) -> str:
    """Return the HTML of a run, which refers to no other file."""
    body = [_head(run)]
    cases = run.by_case()
    for level, title in LEVELS.items():
        chosen = [sides for sides in cases.values() if next(iter(sides.values())).level == level]
        if chosen:
            body += [f"<h2>{escape(title)}</h2>", *map(_case, chosen)]
    body += [
        "<h2>Against the machine</h2>",
        "<p class=soft>Our forward calls by operations per byte of the least traffic. The roof is "
        "what this machine reads and multiplies at best, measured in the same run.</p>",
        f"<figure>{roofline(run)}</figure>",
    ]
    if run.memory:
        body += [
            "<h2>Memory by source length</h2>",
            "<p class=soft>Growth of a fresh process over a training step of concat, B=8, T=40, "
            "D=256.</p>",
            f"<figure>{memory_picture(run)}</figure>",
        ]
    if run.growth:
        body += ["<h2>Growth of time</h2>", f"<figure>{growth_picture(run)}</figure>"]
        body.append(_table(*growth_table(run)))
    body += ["<h2>Size</h2>", _sizes(run)]
    return TEMPLATE.read_text(encoding="utf-8").replace("@BODY@", "\n".join(body))


def _head(run: Run) -> str:
    facts = run.provenance
    where = facts.get("gpu") or f"{facts['processor']}, {facts['instruction_set']}"
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    wrong = [record for record in run.records if record.withheld]
    text = (
        f"<p>Fused Luong attention against what people use in its place: the same inputs, the same "
        f"run, all sides taking turns. Every side is first compared with float64. A side whose "
        f"error exceeds twice that of eager in the same dtype, plus rounding, has no time here"
        f"{' (' + str(len(wrong)) + ' withheld)' if wrong else ''}. Times are medians, ± half the "
        f"distance between the quartiles. Tap a case for every side, with errors and memory.</p>"
        f"<p class=soft>{escape(where)}, {facts['threads']} threads; {escape(versions)}; commit "
        f"{escape(facts['commit'])}; {escape(facts['date'])}. Reads "
        f"{run.limits.read / 1e9:.0f} GB/s, multiplies {run.limits.peak / 1e9:.0f} GFLOP/s.</p>"
    )
    return text


def _case(sides: dict[str, Record]) -> str:
    first = next(iter(sides.values()))
    ours, others = best_of_ours(sides), rivals(sides)
    eager = speedup(ours, sides.get(EAGER))
    factor = "" if eager is None else f"<span class=factor>{eager:.2f}x vs eager</span>"
    way = WAYS.get(first.way, first.way)
    head = (
        f"{factor}<span class=name>{escape(first.name)}</span>, {escape(score_of(first))}"
        f"<br><span class=soft>{sizes_of(first)}, {way}; "
        f"{escape(first.origin)}</span>"
    )
    shown = [record for record in (ours, *others) if record is not None]
    longest = max((r.seconds.median for r in shown if r.seconds), default=1.0)
    bars = "".join(_bar(record, longest) for record in shown)
    return (
        f"<details class=case><summary>{head}<div class=bars>{bars}</div></summary>"
        f"{_details(sides)}</details>"
    )


def _bar(record: Record, longest: float) -> str:
    name = f"<span>{escape(record.side)}</span>"
    if record.seconds is None:
        return f"{name}<span class=wrong>{WITHHELD}</span><span></span>"
    width = 100 * record.seconds.median / longest
    kind = "bar ours" if record.ours else "bar"
    time = f"{duration(record.seconds.median)} ±{record.seconds.spread:.0%}"
    rate = "" if record.tokens is None else f"<br>{record.tokens / record.seconds.median:,.0f}/s"
    return (
        f"{name}<div><div class='{kind}' style='width:{width:.1f}%'></div></div>"
        f"<span class=time>{time}{rate}</span>"
    )


def _details(sides: dict[str, Record]) -> str:
    rows = []
    for record in sides.values():
        if record.unable:
            rows.append([record.side, f"not here: {record.unable}"])
            continue
        worst = max(record.errors.values(), default=None)
        time = record.seconds
        rows.append(
            [
                record.side,
                WITHHELD if time is None else f"{duration(time.median)} ±{time.spread:.0%}",
                "" if time is None else str(time.runs),
                "" if worst is None else f"{worst:.1e}",
                "" if record.peak_bytes is None else f"{record.peak_bytes / 1e6:,.0f} MB",
                "" if record.first_call is None else duration(record.first_call),
                "" if record.read_share is None else f"{record.read_share:.0%}",
                "" if record.peak_share is None else f"{record.peak_share:.0%}",
            ]
        )
    header = ["side", "time", "runs", "error", "memory", "first call", "of read", "of peak"]
    return _table(header, rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cells(kind: str, row: Sequence[str]) -> str:
        wide = (
            f" colspan={len(header) - 1} style='text-align:left'"
            if len(row) == 2 < len(header)
            else ""
        )
        return "".join(
            f"<{kind}{wide if at else ''}>{escape(cell)}</{kind}>" for at, cell in enumerate(row)
        )

    lines = [f"<tr>{cells('th', header)}</tr>", *(f"<tr>{cells('td', row)}</tr>" for row in rows)]
    return f"<div class=scroll><table>{''.join(lines)}</table></div>"


def _sizes(run: Run) -> str:
    rows = [[name, f"{size / 1e6:.1f} MB"] for name, size in run.sizes.items()]
    return _table(["what", "size"], rows)


def readme_table(run: Run) -> str:
    """The table of the README: ours against eager and the best other side, in Markdown.

    It shows the cases of the short suite, also for a full run.
    """
    short = short_cases() & {record.id for record in run.records}
    facts = run.provenance
    lines = [
        f"{facts.get('gpu') or facts['processor']}, {facts['threads']} threads, torch "
        f"{facts['versions']['torch']}, {facts['date'][:10]}; (B, T, S, D), float32 unless said.",
        "",
        "| case | score | sizes | ours | against eager | best other | against it |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, sides in run.by_case().items():
        if short and name not in short:
            continue
        first = next(iter(sides.values()))
        ours, others = best_of_ours(sides), rivals(sides)
        against, best = (
            speedup(ours, sides.get(EAGER)),
            speedup(ours, others[0] if others else None),
        )
        if ours is None or against is None or ours.seconds is None or best is None:
            continue
        way = "" if first.way == "forward" or first.level == "model" else ", fwd+bwd"
        lines.append(
            f"| {first.name}{way} | {score_of(first)} | {sizes_of(first)} | "
            f"{duration(ours.seconds.median)} | {against:.2f}x | {others[0].side} | {best:.2f}x |"
        )
    return "\n".join(lines)


def put_into(text: str, table: str) -> str:
    """Return a document with the table between its marks. Raises ValueError if it has no marks."""
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"there is no {BEGIN} ... {END}")
    return pattern.sub(lambda _: f"{BEGIN}\n{table}\n{END}", text)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks report", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("results", type=Path, metavar="RESULTS.json")
    parser.add_argument("--output", type=Path, metavar="PAGE.html", help="write the page")
    parser.add_argument("--readme", type=Path, metavar="FILE.md", help="write the table into it")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="write the pictures there")
    options = parser.parse_args(arguments)
    if options.output is options.readme is options.pictures is None:
        parser.error("one of --output, --readme and --pictures is needed")
    try:
        run = Run.load(options.results)
        if options.readme is not None:
            text = put_into(options.readme.read_text(encoding="utf-8"), readme_table(run))
            options.readme.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    if options.pictures is not None:
        for name, draw in PICTURES.items():
            if name in ("memory", "growth") and not getattr(run, name):
                continue  # the short suite does not measure it
            write_whole(options.pictures / f"{name}.svg", draw(run))
    if options.output is not None:
        write_whole(options.output, page(run))
        print(f"written: {options.output}")
    return 0
