"""``fused-attn predict``: lines in, lines out, and alignments as a picture or as text."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fused_attn.seq2seq.checkpoints.files import write_atomically
from fused_attn.seq2seq.commands.options import load_models, search_config, set_threads
from fused_attn.seq2seq.config import SearchConfig
from fused_attn.seq2seq.data.links import pharaoh
from fused_attn.seq2seq.data.pairs import Symbols
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.inference.alignments import hard_links, replace_unknown, soft_alignment
from fused_attn.seq2seq.inference.files import Group, predict_file
from fused_attn.seq2seq.inference.prediction import Prediction
from fused_attn.seq2seq.inference.predictor import Predictor

# Panels of a picture of alignments.
MAX_PANELS = 12
# What a file of alignments holds, by the end of its name: pictures, or a line for each source.
PICTURES, TEXTS = (".png", ".svg"), (".pharaoh", ".soft")

_READ_BYTES = 1 << 16


@dataclass(frozen=True)
class _Wanted:
    """What is asked of every lot of lines."""

    search: SearchConfig
    weights: bool
    scores: bool
    replace_unknown: bool


def run(args: Namespace) -> int:
    """A line out for each line in, as soon as it is there; to a file, all of them at the end."""
    set_threads(args.threads)
    group = Group.of_environment()
    _check_files(args, group)
    search = search_config(args)
    predictor = load_models(args)
    has_attention = any(model.config.score != "none" for model in predictor.models)
    for option in ("alignments", "replace_unknown"):
        if getattr(args, option) and not has_attention:
            name = option.replace("_", "-")
            raise InputError(f"--{name}: the model has no attention to draw or to copy by")
    weights = args.alignments is not None or args.replace_unknown
    wanted = _Wanted(search, weights, args.scores, args.replace_unknown)
    if args.output is not None:

        def answer(lot: list[bytes], before: int) -> str:
            lines, _, problem = _predict_lot(predictor, lot, "line", before, wanted)
            if problem is not None:
                raise problem
            return lines

        predict_file(args.input, args.output, answer, group)
        return 0
    return _predict_stream(args, predictor, wanted)


def _check_files(args: Namespace, group: Group) -> None:
    drawn: Path | None = args.alignments
    if drawn is not None and drawn.suffix.lower() not in (*PICTURES, *TEXTS):
        names = ", ".join((*PICTURES, *TEXTS))
        raise InputError(f"--alignments must name a file that ends in {names}, got {drawn}")
    if drawn is not None and not drawn.parent.is_dir():
        raise InputError(f"--alignments: there is no directory {drawn.parent}")
    if (args.input is None) != (args.output is None):
        raise InputError("--input and --output go together")
    if args.output is not None:
        if args.text or drawn is not None:
            raise InputError("--input goes without TEXT and --alignments")
        if not args.output.parent.is_dir():
            raise InputError(f"--output: there is no directory {args.output.parent}")
    elif group.size > 1:
        raise InputError("several processes need --input and --output to share the work")


def _predict_stream(args: Namespace, predictor: Predictor, wanted: _Wanted) -> int:
    drawn: Path | None = args.alignments
    kind_of_file = "" if drawn is None else drawn.suffix.lower()
    found: list[Prediction] = []  # for the file: all for a text, the first for a picture
    count = 0
    for lot, kind in _lots(args):
        lines, predictions, problem = _predict_lot(predictor, lot, kind, count, wanted)
        print(lines, end="", flush=True)
        if problem is not None:
            raise problem
        for prediction in predictions:
            if kind_of_file in TEXTS:
                found.append(prediction)
            elif drawn is not None and len(found) < MAX_PANELS and prediction.tokens:
                found.append(prediction)
        count += len(lot)
    if drawn is not None:
        _write_alignments(found, drawn, count)
    return 0


def _lots(args: Namespace) -> Iterator[tuple[list[bytes], str]]:
    """Yield the sources in lots, with what one of them is called."""
    if args.text:
        yield [os.fsencode(text) for text in args.text], "argument"
    elif sys.stdin is None:
        raise InputError("there is neither a TEXT nor a standard input")
    else:
        try:
            descriptor = sys.stdin.fileno()
        except (OSError, ValueError):  # a stream of Python's, as in a test or a notebook
            yield sys.stdin.read().encode().splitlines(), "line"
            return
        for lines in _available_lines(descriptor):
            yield lines, "line"


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
    wanted: _Wanted,
) -> tuple[str, list[Prediction], InputError | None]:
    """Predict for some lines; for those before the first that cannot be read.

    Returns the text to write, of which every source has ``search.nbest`` lines, the last ones empty
    if fewer were found; the best of each; and what is wrong with a line, if one is.
    """
    sources: list[Symbols] = []
    problem: InputError | None = None
    for number, text in enumerate(lot, start=before + 1):
        try:
            source = predictor.read(text.decode())
            predictor.encode(source)
        except UnicodeDecodeError:
            problem = InputError(f"{kind} {number} is not UTF-8 text")
            break
        except InputError as error:
            problem = InputError(f"{kind} {number}: {error}")
            break
        sources.append(source)
    predictions = predictor.predict(sources, wanted.search, alignments=wanted.weights)
    lines = []
    for best in predictions:
        for prediction in best.alternatives:
            score = f"{prediction.ranking_score:.4f}\t" if wanted.scores else ""
            lines.append(score + _text(prediction, predictor, wanted))
        lines += [""] * (wanted.search.nbest - len(best.alternatives))
    written = "".join(f"{line}\n" for line in lines)
    return written, predictions, problem


def _text(prediction: Prediction, predictor: Predictor, wanted: _Wanted) -> str:
    if not wanted.replace_unknown:
        return prediction.text
    copied = replace_unknown(prediction.tokens, prediction.source, prediction.alignment)
    return predictor.task.write(copied)


def _write_alignments(found: Sequence[Prediction], path: Path, count: int) -> None:
    try:
        if path.suffix.lower() in TEXTS:
            write_atomically(path, _lines(found, path.suffix.lower()).encode())
            return
        from fused_attn.seq2seq.commands.plots import (
            save_alignments,  # matplotlib is slow to import
        )

        if not found:
            raise InputError("there is nothing to draw: no source has a target")
        save_alignments(found, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
    if len(found) < count:
        print(f"{path} shows the first {len(found)} of {count} sources", file=sys.stderr)


def _lines(found: Sequence[Prediction], kind: str) -> str:
    lines = []
    for prediction in found:
        assert prediction.alignment is not None
        weights = prediction.alignment
        lines.append(soft_alignment(weights) if kind == ".soft" else pharaoh(hard_links(weights)))
    return "".join(f"{line}\n" for line in lines)
