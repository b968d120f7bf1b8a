"""``fused-attn evaluate``: evaluate a model on held-out data."""

from __future__ import annotations

import hashlib
import json
import math
from argparse import Namespace
from collections.abc import Sequence

from fused_attn.seq2seq.checkpoints.find import find_checkpoint
from fused_attn.seq2seq.commands.options import load_models, note, search_config, set_threads
from fused_attn.seq2seq.data.pairs import Data, Item, Symbols
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.inference.evaluate import judge, measures, perplexity, targets
from fused_attn.seq2seq.inference.predictor import Predictor
from fused_attn.seq2seq.metrics import PERPLEXITY, shown
from fused_attn.seq2seq.tasks.base import Task


def run(args: Namespace) -> int:
    """Print the metrics of a model, and samples if asked for."""
    set_threads(args.threads)
    for option in ("limit", "samples"):
        value = getattr(args, option)
        if value is not None and value < (option == "limit"):
            least = "positive" if option == "limit" else "at least 0"
            raise InputError(f"--{option} must be {least}, got {value}")
    search = search_config(args)
    predictor = load_models(args)
    task = predictor.task
    items, notes = _items(args, task)
    notes += _long(predictor, items)
    for text in notes:
        note(text)
    found = targets(predictor, items, search)
    errors = judge(found, items)
    measured = measures(task, found, items)
    if task.by_perplexity:
        measured = {PERPLEXITY: perplexity(predictor, items), **measured}
    samples = list(zip(items, found, strict=True))[: args.samples]
    if args.json:
        # JSON has no infinity and no NaN.
        metrics = {n: v if math.isfinite(v) else None for n, v in measured.items()}
        report = {
            "checkpoint": str(find_checkpoint(args.model)),
            "task": task.name,
            "units": dict(zip(("sources", "symbols"), task.units, strict=True)),
            "count": errors.count,
            "wrong": errors.wrong,
            "symbols": errors.reference_symbols,
            "edits": errors.edits,
            **metrics,
            "metrics": metrics,
            "samples": [_sample(task, item, target) for item, target in samples],
            "notes": notes,
        }
        print(json.dumps(report, ensure_ascii=False))
        return 0
    rows = [[name, shown(name, value)] for name, value in measured.items()]
    print(_table([[task.units[0], f"{errors.count:,}"], *rows]))
    if samples:
        rows = [["source", "model", "reference"]]
        for item, target in samples:
            references = " | ".join(map(task.write, item.references))
            rows.append([task.show(item.source), task.write(target), references])
        print(f"\n{_table(rows)}")
    return 0


def _sample(task: Task, item: Item, target: Symbols) -> dict[str, object]:
    """A sample as symbols, and as the texts in the table."""
    return {
        "source": item.source,
        "model": target,
        "references": item.references,
        "source_text": task.show(item.source),
        "model_text": task.write(target),
        "reference_texts": [task.write(reference) for reference in item.references],
    }


def _long(predictor: Predictor, items: Sequence[Item]) -> list[str]:
    """The note about sources that are longer than those of the training, if there are any."""
    longest = predictor.longest_source
    count = sum(longest is not None and len(item.source) > longest for item in items)
    if not count:
        return []
    units = predictor.task.units[0]
    verb, whose = ("is", "its target") if count == 1 else ("are", "their targets")
    return [
        f"{count:,} of {len(items):,} {units} {verb} longer than the longest source of the "
        f"training ({longest} symbols): {whose} may be incomplete"
    ]


def _items(args: Namespace, task: Task) -> tuple[list[Item], list[str]]:
    """Return the items to evaluate on, in a pseudo-random order, and notes about them."""
    units = task.units[0]
    notes: list[str] = []
    unchecked = f"cannot check whether the model was trained on these {units}"
    if args.test is None:
        data = task.load() if task.has_data else None
        items = list(data.test) if data else []
        if not data or not items:
            raise InputError("the model has no test set: name a file with --test")
    else:
        items, notes = task.listed(args.test)
        if not task.has_data:
            notes.append(f"{unchecked}: it names no training data")
            return _chosen(items, args.limit), notes
        try:
            data = task.load()
        except InputError as error:  # a model may be used where its training data is not available
            notes.append(f"{unchecked}: {error}")
            return _chosen(items, args.limit), notes
    return _chosen(items, args.limit), [*notes, *_seen(items, data, units)]


def _seen(items: Sequence[Item], data: Data, units: str) -> list[str]:
    """Notes about items whose sources are in the training or the development set."""
    judged = {item.source for item in items}
    trained = {pair.source for pair in data.train if pair.source in judged}
    chosen = ({item.source for item in data.dev} & judged) - trained
    return [
        f"{len(seen):,} of these {units} {'is' if len(seen) == 1 else 'are'} in the {where} set of "
        "the model"
        for where, seen in (("training", trained), ("development", chosen))
        if seen
    ]


def _chosen(items: Sequence[Item], limit: int | None) -> list[Item]:
    return sorted(items, key=_shuffled)[:limit]


def _shuffled(item: Item) -> bytes:
    return hashlib.sha256("\0".join(("order", *item.source)).encode()).digest()


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
