"""What the subcommands evaluate, export, aer, curves and chat do with their options."""

from __future__ import annotations

import hashlib
import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from fused_attn.seq2seq.checkpoints import files as checkpoint
from fused_attn.seq2seq.checkpoints.average import averaged
from fused_attn.seq2seq.checkpoints.compress import narrowed
from fused_attn.seq2seq.commands.options import load_models, note, search_config, set_threads
from fused_attn.seq2seq.data.pair_files import read_text
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.inference import evaluate as judging
from fused_attn.seq2seq.inference.alignments import Link, alignment_error_rate, parse_pharaoh
from fused_attn.seq2seq.metrics import PERPLEXITY, shown
from fused_attn.seq2seq.tasks.base import Item, Task
from fused_attn.seq2seq.tasks.registry import TASKS
from fused_attn.seq2seq.training.run import START_FROM, TEACHER, find_checkpoint


def export(args: Namespace) -> int:
    """``fused-attn export``: write the model of a checkpoint, to be used and not trained on."""
    directory: Path = args.output
    if directory.exists():
        raise InputError(f"--output: {directory} is already there")
    meta, parameters = averaged([find_checkpoint(model) for model in (args.model, *args.average)])
    # What a training goes on from is not needed any more; of a mean nothing has been measured.
    left = {"position", "format_version", START_FROM, TEACHER} | (
        {"dev"} if args.average else set()
    )
    kept = {key: value for key, value in meta.items() if key not in left}
    kept["task"] = kept["task"] | dict.fromkeys(TASKS[kept["task"]["name"]].only_trained_on)
    checkpoint.save(directory, kept, narrowed(parameters, args.store), None)
    size = sum(file.stat().st_size for file in directory.iterdir())
    print(f"{directory}: {size / 1e6:.1f} MB")
    return 0


def aer(args: Namespace) -> int:
    """``fused-attn aer``: print the alignment error rate of a file of links."""
    found, gold = _read_links(args.found), _read_links(args.gold)
    if len(found) != len(gold):
        raise InputError(f"{args.found} has {len(found)} lines and {args.gold} {len(gold)}")
    try:
        rate = alignment_error_rate([sure for sure, _ in found], gold)
    except ValueError as error:
        raise InputError(str(error)) from None
    print(f"AER  {100 * rate:.2f} %")
    return 0


def _read_links(path: Path) -> list[tuple[set[Link], set[Link]]]:
    found = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        try:
            found.append(parse_pharaoh(line))
        except ValueError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
    return found


def evaluate(args: Namespace) -> int:
    """``fused-attn evaluate``: print error rates, and samples if asked for."""
    set_threads(args.threads)
    for option in ("limit", "samples"):
        value = getattr(args, option)
        if value is not None and value < (option == "limit"):
            raise InputError(f"--{option} must be positive, got {value}")
    search = search_config(args)
    predictor, task = load_models(args)
    items = _items(args, task)
    found = judging.targets(predictor, items, search)
    errors = judging.judge(found, items)
    measures = {**task.quality(found, items), **judging.rates(task, errors)}
    if task.by_perplexity:
        measures = {PERPLEXITY: judging.perplexity(predictor, items), **measures}
    samples = list(zip(items, found, strict=True))[: args.samples]
    if args.json:
        report = {
            "checkpoint": str(find_checkpoint(args.model)),
            "task": task.name,
            "count": errors.count,
            "wrong": errors.wrong,
            "symbols": errors.reference_symbols,
            "edits": errors.edits,
            **measures,
            "samples": [
                {"source": i.source, "model": target, "references": i.references}
                for i, target in samples
            ],
        }
        print(json.dumps(report, ensure_ascii=False))
        return 0
    rows = [[name, shown(name, value)] for name, value in measures.items()]
    print(_table([[task.units[0], f"{errors.count:,}"], *rows]))
    if samples:
        rows = [["source", "model", "reference"]]
        for item, target in samples:
            references = " | ".join(map(task.write, item.references))
            rows.append([task.show(item.source), task.write(target), references])
        print(f"\n{_table(rows)}")
    return 0


def _items(args: Namespace, task: Task) -> list[Item]:
    """Return the items to judge, in an order that looks random, with a note on what is odd."""
    if args.test is None:
        items = list(task.load().test)
        if not items:
            raise InputError("there is no test data: name a file with --test")
    else:
        items, notes = task.listed(args.test)
        for text in notes:
            note(text)
        try:
            data = task.load()
        except InputError as error:  # a model goes further than the data it was made of
            note(f"whether the model was trained on these {task.units[0]} is not known: {error}")
            return sorted(items, key=_shuffled)[: args.limit]
        judged = {item.source for item in items}
        trained = {pair.source for pair in data.train if pair.source in judged}
        chosen = ({item.source for item in data.dev} & judged) - trained
        for what, seen in (("trained on", trained), ("chosen by", chosen)):
            if seen:
                note(f"the model was {what} {len(seen)} of these {task.units[0]}")
    return sorted(items, key=_shuffled)[: args.limit]


def curves(args: Namespace) -> int:
    """``fused-attn curves``: draw how trainings went."""
    from fused_attn.seq2seq.commands.plots import save_curves  # matplotlib is slow to import

    try:
        save_curves(args.runs, args.output)
    except OSError as error:
        raise InputError(f"cannot write {args.output}: {error.strerror}") from None
    return 0


def chat(args: Namespace) -> int:
    """``fused-attn chat``: answer lines until there are no more."""
    set_threads(args.threads)
    search = search_config(args)
    predictor, task = load_models(args)
    asks = sys.stdin.isatty()
    if asks:
        import readline  # noqa: F401, input() has a history with it

        print("Say something; Ctrl-D ends it.")
    while True:
        try:
            text = input("> " if asks else "")
        except EOFError:
            print(end="\n" if asks else "")
            return 0
        except UnicodeDecodeError:
            raise InputError("a line is not UTF-8 text") from None
        source = task.read(text)
        if not source:
            continue
        try:
            (found,) = predictor.best([source], search)
        except InputError as error:  # a symbol that the model does not know
            note(str(error))
            continue
        print(task.write(found.target), flush=True)


def _shuffled(item: Item) -> bytes:
    return hashlib.sha256("\0".join(("order", *item.source)).encode()).digest()


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
