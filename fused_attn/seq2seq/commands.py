"""What the subcommands train, predict and evaluate do with their options."""

from __future__ import annotations

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
from typing import TypeVar

import torch

from fused_attn.seq2seq import checkpoint, g2p, g2p_run
from fused_attn.seq2seq.config import ModelConfig, SearchConfig, TrainingConfig
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.g2p_run import Recipe, TaskConfig
from fused_attn.seq2seq.inference import Prediction, Predictor
from fused_attn.seq2seq.progress import make_progress
from fused_attn.seq2seq.runs import Run, find_checkpoint, last_checkpoint

# Panels of a picture of alignments.
MAX_PANELS = 12

_READ_BYTES = 1 << 16

Config = TypeVar("Config", ModelConfig, TrainingConfig, TaskConfig)


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
    recipe = _given(Recipe(ModelConfig(), TrainingConfig(), TaskConfig()), args)
    return g2p_run.start(directory, recipe, make_progress(), args.backend)


def _resume(args: Namespace) -> Run:
    last = last_checkpoint(args.output)
    recipe = g2p_run.load_recipe(last, checkpoint.load_metadata(last))
    started, asked = _options(recipe), _options(_given(recipe, args))
    changed = [f"--{name.replace('_', '-')}" for name in started if asked[name] != started[name]]
    if changed:
        raise InputError(
            f"the run in {args.output} was not started with this {changed[0]}; "
            "leave it out to go on, or start another run"
        )
    return g2p_run.resume(args.output, make_progress(), args.backend)


def _options(recipe: Recipe) -> dict[str, object]:
    return {name: value for part in asdict(recipe).values() for name, value in part.items()}


def _given(recipe: Recipe, args: Namespace) -> Recipe:
    """Return ``recipe`` with the options that were given."""
    options = dict(vars(args))
    if args.test_words is not None:
        options["test_words"] = tuple(sorted(set(g2p.read_words(args.test_words))))

    def updated(config: Config) -> Config:
        names = [field.name for field in fields(config)]
        return replace(config, **{n: options[n] for n in names if options[n] is not None})

    try:
        return Recipe(updated(recipe.model), updated(recipe.training), updated(recipe.task))
    except ValueError as error:
        raise InputError(f"--{str(error).replace('_', '-', 1)}") from None


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
    predictor = _load(args)
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
        for prediction in _predict_lot(predictor, lot, kind, count, *wanted):
            if picture is not None and len(shown) < MAX_PANELS and prediction.target:
                shown.append(prediction)
        count += len(lot)
    if picture is not None:
        _draw(shown, picture, count)
    return 0


def _load(args: Namespace) -> Predictor:
    paths = [find_checkpoint(model) for model in (args.model, *args.ensemble)]
    return Predictor.load(*paths, backend=args.backend)


def _search_config(args: Namespace) -> SearchConfig:
    given = {f.name: getattr(args, f.name) for f in fields(SearchConfig)}
    try:
        return SearchConfig(**{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise InputError(f"--{str(error).replace('_', '-', 1)}") from None


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
    lot: Sequence[bytes],
    kind: str,
    before: int,
    search: SearchConfig,
    return_weights: bool,
    with_scores: bool,
) -> list[Prediction]:
    """Print the predictions of some words; of those before the first that cannot be read.

    Every word has ``search.nbest`` lines, of which the last are empty if fewer were found. Returns
    the best of each.
    """
    words: list[str] = []
    problem: InputError | None = None
    for number, text in enumerate(lot, start=before + 1):
        try:
            word = text.decode().strip().lower()
            predictor.encode(word)
        except UnicodeDecodeError:
            problem = InputError(f"{kind} {number} is not UTF-8 text")
            break
        except InputError as error:
            problem = InputError(f"{kind} {number}: {error}")
            break
        words.append(word)
    predictions = predictor.predict(words, search, return_weights=return_weights)
    for found in predictions:
        for prediction in found:
            score = f"{prediction.score:.4f}\t" if with_scores else ""
            print(score + " ".join(prediction.target))
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
    directory = find_checkpoint(args.model)
    recipe = g2p_run.load_recipe(directory, checkpoint.load_metadata(directory))
    predictor = _load(args)
    lexicon = g2p.load_dictionary()
    words = _test_words(args, recipe, lexicon)
    found = g2p_run.pronounce(predictor, words, search)
    errors = g2p_run.judge(found, words, lexicon)
    rates = g2p_run.rates(errors)
    samples = list(zip(words, found, strict=True))[: args.samples]
    if args.json:
        report = {
            "checkpoint": str(directory),
            "words": errors.count,
            "wrong": errors.wrong,
            "phones": errors.reference_symbols,
            "edits": errors.edits,
            **rates,
            "samples": [{"word": w, "model": p, "dictionary": lexicon[w]} for w, p in samples],
        }
        print(json.dumps(report))
        return 0
    rows = [[name, f"{100 * rate:.2f} %"] for name, rate in rates.items()]
    print(_table([["words", f"{errors.count:,}"], *rows]))
    if samples:
        rows = [[w, " ".join(p), " | ".join(map(" ".join, lexicon[w]))] for w, p in samples]
        print(f"\n{_table([['word', 'model', 'dictionary'], *rows])}")
    return 0


def _test_words(args: Namespace, recipe: Recipe, lexicon: g2p.Lexicon) -> list[str]:
    """Return the words to judge, in an order that looks random, with a note on what is odd."""
    task = recipe.task
    split = g2p.split_words(lexicon, task.test_words, task.limit_words)
    words = set(split.test)
    if args.test_words is not None:
        listed = set(g2p.read_words(args.test_words))
        words = listed & lexicon.keys()
        if not words:
            raise InputError(f"none of the words in {args.test_words} is in the dictionary")
        if unknown := len(listed) - len(words):
            print(f"note: {unknown} listed words are not in the dictionary", file=sys.stderr)
        if seen := len(words & {*split.train, *split.dev}):
            print(f"note: the model was trained on {seen} of these words", file=sys.stderr)
    return g2p.by_hash(words)[: args.limit]


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _set_threads(threads: int | None) -> None:
    if threads is None:
        return
    if threads < 1:
        raise InputError(f"--threads must be a positive number, got {threads}")
    torch.set_num_threads(threads)
