"""What the subcommands train, predict and evaluate do with their options."""

from __future__ import annotations

import hashlib
import json
import os
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

import torch

from fused_attn.seq2seq import checkpoint, task_run
from fused_attn.seq2seq.config import ModelConfig, SearchConfig, TrainingConfig
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.inference import Prediction, Predictor
from fused_attn.seq2seq.progress import make_progress
from fused_attn.seq2seq.runs import Run, find_checkpoint, last_checkpoint
from fused_attn.seq2seq.task_run import Recipe
from fused_attn.seq2seq.tasks import TASKS, Item, Symbols, Task

# Panels of a picture of alignments.
MAX_PANELS = 12

_READ_BYTES = 1 << 16

Config = TypeVar("Config", ModelConfig, TrainingConfig)


def train(args: Namespace) -> int:
    """``fused-attn train``: return 0 at the end of the plan.

    Raises KeyboardInterrupt if a signal stopped it; a checkpoint is written then.
    """
    _set_threads(args.threads)
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
    return task_run.start(directory, recipe, make_progress(), args.backend, _note)


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


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
        raise _as_option(error) from None


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
        raise _as_option(error) from None


def _as_option(error: ValueError) -> InputError:
    """The message of a configuration, which begins with the field's name, as one of an option."""
    name, _, rest = str(error).partition(" ")
    return InputError(f"--{name.replace('_', '-')} {rest}")


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


def predict(args: Namespace) -> int:
    """``fused-attn predict``: a line out for each word in, as soon as it is there."""
    _set_threads(args.threads)
    picture: Path | None = args.alignments
    if picture is not None and picture.suffix.lower() != ".png":
        raise InputError(f"--alignments must name a .png file, got {picture}")
    if picture is not None and not picture.parent.is_dir():
        raise InputError(f"--alignments: there is no directory {picture.parent}")
    search = _search_config(args)
    predictor, task = _load(args)
    if picture is not None and all(m.config.score == "none" for m in predictor.models):
        raise InputError("--alignments: the model has no attention to draw")
    if args.text:
        lots: Iterator[list[bytes]] = iter([[os.fsencode(text) for text in args.text]])
        kind = "argument"
    elif sys.stdin is None:
        raise InputError("there is neither a TEXT nor a standard input")
    else:
        lots, kind = _available_lines(sys.stdin.fileno()), "line"
    shown: list[Prediction] = []
    count = 0
    for lot in lots:
        wanted = (search, picture is not None, args.scores)
        for prediction in _predict_lot(predictor, task, lot, kind, count, *wanted):
            if picture is not None and len(shown) < MAX_PANELS and prediction.target:
                shown.append(prediction)
        count += len(lot)
    if picture is not None:
        _draw(shown, picture, count)
    return 0


def _load(args: Namespace) -> tuple[Predictor, Task]:
    paths = [find_checkpoint(model) for model in (args.model, *args.ensemble)]
    recipe = task_run.load_recipe(paths[0], checkpoint.load_metadata(paths[0]))
    return Predictor.load(*paths, backend=args.backend), recipe.task


def _search_config(args: Namespace) -> SearchConfig:
    given = {f.name: getattr(args, f.name) for f in fields(SearchConfig)}
    try:
        return SearchConfig(**{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise _as_option(error) from None


def _available_lines(descriptor: int) -> Iterator[list[bytes]]:
    """Yield the lines of a file as they come: those that one read brings go through together."""
    rest = b""
    while data := os.read(descriptor, _READ_BYTES):
        *lines, rest = (rest + data).split(b"\n")
        if lines:
            yield lines
    if rest:
        yield [rest]


def _predict_lot(
    predictor: Predictor,
    task: Task,
    lot: Sequence[bytes],
    kind: str,
    before: int,
    search: SearchConfig,
    return_weights: bool,
    with_scores: bool,
) -> list[Prediction]:
    """Print the predictions of some lines; of those before the first that cannot be read.

    Every source has ``search.nbest`` lines, the last ones empty if fewer were found. Returns the
    best of each.
    """
    sources: list[Symbols] = []
    problem: InputError | None = None
    for number, text in enumerate(lot, start=before + 1):
        try:
            source = task.read(text.decode())
            predictor.encode(source)
        except UnicodeDecodeError:
            problem = InputError(f"{kind} {number} is not UTF-8 text")
            break
        except InputError as error:
            problem = InputError(f"{kind} {number}: {error}")
            break
        sources.append(source)
    predictions = predictor.predict(sources, search, return_weights=return_weights)
    for found in predictions:
        for prediction in found:
            score = f"{prediction.score:.4f}\t" if with_scores else ""
            print(score + task.write(prediction.target))
        print("\n" * (search.nbest - len(found)), end="")
    sys.stdout.flush()
    if problem is not None:
        raise problem
    return [found[0] for found in predictions]


def _draw(shown: Sequence[Prediction], picture: Path, count: int) -> None:
    from fused_attn.seq2seq.plots import save_alignments

    if not shown:
        raise InputError("there is nothing to draw: no word has a pronunciation")
    try:
        save_alignments(shown, picture)
    except OSError as error:
        raise InputError(f"cannot write {picture}: {error.strerror}") from None
    if len(shown) < count:
        print(f"{picture} shows the first {len(shown)} of {count} words", file=sys.stderr)


def evaluate(args: Namespace) -> int:
    """``fused-attn evaluate``: print error rates, and samples if asked for."""
    _set_threads(args.threads)
    for option in ("limit", "samples"):
        value = getattr(args, option)
        if value is not None and value < (option == "limit"):
            raise InputError(f"--{option} must be positive, got {value}")
    search = _search_config(args)
    predictor, task = _load(args)
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
            _note(text)
        data = task.load()
        known = {source for source, _ in data.train} | {item.source for item in data.dev}
        if seen := sum(item.source in known for item in items):
            _note(f"the model was trained on {seen} of these {task.units[0]}")
    return sorted(items, key=_shuffled)[: args.limit]


def _shuffled(item: Item) -> bytes:
    return hashlib.sha256("\0".join(("order", *item.source)).encode()).digest()


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _set_threads(threads: int | None) -> None:
    if threads is None:
        return
    if threads < 1:
        raise InputError(f"--threads must be a positive number, got {threads}")
    torch.set_num_threads(threads)
