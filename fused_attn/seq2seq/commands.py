"""What the subcommands train, predict and evaluate do with their options."""

from __future__ import annotations

import hashlib
import json
import shlex
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from fused_attn.seq2seq import checkpoint, task_run
from fused_attn.seq2seq.alignments import Link, alignment_error_rate, parse_pharaoh
from fused_attn.seq2seq.config import ModelConfig, TrainingConfig
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.options import as_option, load_models, note, search_config, set_threads
from fused_attn.seq2seq.parallel import read_text
from fused_attn.seq2seq.progress import make_progress
from fused_attn.seq2seq.runs import Run, find_checkpoint, last_checkpoint
from fused_attn.seq2seq.task_run import Recipe
from fused_attn.seq2seq.tasks import TASKS, Item, Task

Config = TypeVar("Config", ModelConfig, TrainingConfig)


def train(args: Namespace) -> int:
    """``fused-attn train``: return 0 at the end of the plan.

    Raises KeyboardInterrupt if a signal stopped it; a checkpoint is written then.
    """
    set_threads(args.threads)
    directory: Path = args.output
    with _stop_signals() as should_stop:
        try:
            run = _resume(args) if args.resume else _start(args)
            if run.trainer.finished:
                print(f"{directory} is complete: all {run.trainer.total_steps} steps are done")
                return 0
            stopped = not run.train(should_stop)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise InputError(
                f"cannot write to {error.filename or directory}: {error.strerror}; "
                "the checkpoints of before are whole"
            ) from None
    if stopped:
        trainer = run.trainer
        print(
            f"stopped at step {trainer.position.step} of {trainer.total_steps}; go on with: "
            f"fused-attn train {args.task} --output {shlex.quote(str(directory))} --resume",
            file=sys.stderr,
        )
        raise KeyboardInterrupt
    print(f"best checkpoint: {find_checkpoint(directory)}")
    return 0


def _start(args: Namespace) -> Run:
    directory: Path = args.output
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory} is not an empty directory; --resume goes on with a run")
    kind = TASKS[args.task]
    recipe = Recipe(
        _updated(kind.model, args), _updated(kind.training, args), _task(kind, {}, args)
    )
    return task_run.start(directory, recipe, make_progress(), args.backend, note)


def _resume(args: Namespace) -> Run:
    last = last_checkpoint(args.output)
    recipe = task_run.load_recipe(last, checkpoint.load_metadata(last))
    if recipe.task.name != args.task:
        raise InputError(f"the run in {args.output} is of the task {recipe.task.name}")
    asked = Recipe(
        _updated(recipe.model, args),
        _updated(recipe.training, args),
        _task(type(recipe.task), asdict(recipe.task.config), args),
    )
    for part, other in zip(recipe.to_json().values(), asked.to_json().values(), strict=True):
        for name, value in part.items():
            if other[name] != value:
                raise InputError(
                    f"the run in {args.output} was not started with this "
                    f"--{name.replace('_', '-')}; leave it out to go on, or start another run"
                )
    return task_run.resume(args.output, make_progress(), args.backend)


def _updated(config: Config, args: Namespace) -> Config:
    """Return ``config`` with the options that were given."""
    options = vars(args)
    given = {f.name: options[f.name] for f in fields(config) if options[f.name] is not None}
    try:
        return replace(config, **given)
    except ValueError as error:
        raise as_option(error) from None


def _task(kind: type[Task], values: dict[str, Any], args: Namespace) -> Task:
    """Return the task with the options that were given; those of other tasks are refused."""
    known = {field.name for task in TASKS.values() for field in fields(task.kind)} - {"test"}
    given = {n: v for n, v in vars(args).items() if n in known and v is not None}
    own = {field.name for field in fields(kind.kind)}
    if others := sorted(given.keys() - own):
        option = others[0].replace("_", "-")
        raise InputError(f"--{option} is no option of the task {kind.name}")
    if args.test is not None:
        given |= kind.test_option(args.test)
    try:
        return kind(kind.kind(**values | given))
    except ValueError as error:
        raise as_option(error) from None


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether SIGINT or SIGTERM has come; a second one interrupts."""
    received: list[int] = []

    def receive(number: int, _: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, receive) for number in signals}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def export(args: Namespace) -> int:
    """``fused-attn export``: write the model of a checkpoint, to be used and not trained on."""
    directory: Path = args.output
    if directory.exists():
        raise InputError(f"--output: {directory} is already there")
    place = find_checkpoint(args.model)
    meta = checkpoint.load_metadata(place)
    task_run.load_recipe(place, meta)
    parameters = checkpoint.load_tensors(place, checkpoint.MODEL)
    if args.half:
        parameters = {name: tensor.half() for name, tensor in parameters.items()}
    kept = ("model", "training", "task", "source", "target", "training_pairs", "dev")
    checkpoint.save(directory, {key: meta.get(key) for key in kept}, parameters, None)
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
    found = task_run.targets(predictor, items, search)
    errors = task_run.judge(found, items)
    rates = task_run.rates(task, errors)
    samples = list(zip(items, found, strict=True))[: args.samples]
    if args.json:
        report = {
            "checkpoint": str(find_checkpoint(args.model)),
            "task": task.name,
            "count": errors.count,
            "wrong": errors.wrong,
            "symbols": errors.reference_symbols,
            "edits": errors.edits,
            **rates,
            "samples": [
                {"source": i.source, "model": target, "references": i.references}
                for i, target in samples
            ],
        }
        print(json.dumps(report, ensure_ascii=False))
        return 0
    rows = [[name, f"{100 * rate:.2f} %"] for name, rate in rates.items()]
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
        data = task.load()
        known = {source for source, _ in data.train} | {item.source for item in data.dev}
        if seen := sum(item.source in known for item in items):
            note(f"the model was trained on {seen} of these {task.units[0]}")
    return sorted(items, key=_shuffled)[: args.limit]


def _shuffled(item: Item) -> bytes:
    return hashlib.sha256("\0".join(("order", *item.source)).encode()).digest()


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
