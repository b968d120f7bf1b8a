"""``fused-attn predict``: predict a target for each line, and write alignments."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fused_attn.seq2seq.commands.options import load_models, search_config, set_threads
from fused_attn.seq2seq.config import SearchConfig
from fused_attn.seq2seq.data.links import pharaoh
from fused_attn.seq2seq.data.pairs import Symbols
from fused_attn.seq2seq.errors import InputError, OptionError
from fused_attn.seq2seq.inference.alignments import hard_links, replace_unknown, soft_alignment
from fused_attn.seq2seq.inference.files import Group, predict_file
from fused_attn.seq2seq.inference.prediction import Prediction
from fused_attn.seq2seq.inference.predictor import Predictor
from fused_attn.seq2seq.outputs import write_atomically
from fused_attn.seq2seq.vocabulary import UNKNOWN

# Largest number of heat maps in a picture of alignments.
MAX_PANELS = 12
# File name endings for --alignments: a picture, or a text file with one line per source.
PICTURES, TEXTS = (".png", ".svg"), (".pharaoh", ".soft")

_READ_BYTES = 1 << 16


@dataclass(frozen=True)
class _Output:
    """What to compute and print for each batch of lines."""

    search: SearchConfig
    weights: bool
    scores: bool
    replace_unknown: bool


def run(args: Namespace) -> int:
    """Print a line for each input line as soon as it is predicted, or write all to --output."""
    set_threads(args.threads)
    group = Group.of_environment()
    _check_files(args, group)
    search = search_config(args)
    predictor = load_models(args)
    has_attention = any(model.config.score != "none" for model in predictor.models)
    for option in ("alignments", "replace_unknown"):
        if getattr(args, option) and not has_attention:
            name = option.replace("_", "-")
            raise InputError(f"--{name} needs a model with attention, and this one has none")
    if args.replace_unknown and UNKNOWN not in predictor.target.symbols:
        raise OptionError("replace_unknown", f"has no effect: the model never writes {UNKNOWN}")
    weights = args.alignments is not None or args.replace_unknown
    output = _Output(search, weights, args.scores, args.replace_unknown)
    if args.output is not None:

        def answer(batch: list[bytes], before: int) -> str:
            lines, _, problem = _predict_batch(predictor, batch, "line", before, output)
            if problem is not None:
                raise problem
            return lines

        predict_file(args.input, args.output, answer, group)
        return 0
    return _predict_stream(args, predictor, output)


def _check_files(args: Namespace, group: Group) -> None:
    path: Path | None = args.alignments
    if path is not None and path.suffix.lower() not in (*PICTURES, *TEXTS):
        endings = ", ".join((*PICTURES, *TEXTS))
        raise InputError(f"--alignments must be a file name ending in one of {endings}, got {path}")
    if path is not None and not path.parent.is_dir():
        raise InputError(f"--alignments: there is no directory {path.parent}")
    if (args.input is None) != (args.output is None):
        raise InputError("--input and --output must be given together")
    if args.output is not None:
        if args.text or path is not None:
            raise InputError("--input cannot be combined with TEXT or --alignments")
        if not args.output.parent.is_dir():
            raise InputError(f"--output: there is no directory {args.output.parent}")
    elif group.size > 1:
        raise InputError("prediction with several processes needs --input and --output")


def _predict_stream(args: Namespace, predictor: Predictor, output: _Output) -> int:
    path: Path | None = args.alignments
    ending = "" if path is None else path.suffix.lower()
    found: list[Prediction] = []  # for --alignments: all for a text file, the first for a picture
    count = 0
    for batch, kind in _batches(args):
        lines, predictions, problem = _predict_batch(predictor, batch, kind, count, output)
        print(lines, end="", flush=True)
        if problem is not None:
            raise problem
        for prediction in predictions:
            if ending in TEXTS:
                found.append(prediction)
            elif path is not None and len(found) < MAX_PANELS and prediction.tokens:
                found.append(prediction)
        count += len(batch)
    if path is not None:
        _write_alignments(found, path, count)
    return 0


def _batches(args: Namespace) -> Iterator[tuple[list[bytes], str]]:
    """Yield the sources in batches, each with what error messages call a source."""
    if args.text:
        yield [os.fsencode(text) for text in args.text], "argument"
    elif sys.stdin is None:
        raise InputError("there is no TEXT, and standard input is closed")
    else:
        try:
            descriptor = sys.stdin.fileno()
        except (OSError, ValueError):  # not a file, as in a test or a notebook
            yield sys.stdin.read().encode().splitlines(), "line"
            return
        for lines in _available_lines(descriptor):
            yield lines, "line"


def _available_lines(descriptor: int) -> Iterator[list[bytes]]:
    """Yield the lines of a file as they arrive; those of one read form a batch."""
    rest = b""
    while data := os.read(descriptor, _READ_BYTES):
        *lines, rest = (rest + data).split(b"\n")
        if lines:
            yield lines
    if rest:
        yield [rest]


def _predict_batch(
    predictor: Predictor,
    batch: Sequence[bytes],
    kind: str,
    before: int,
    output: _Output,
) -> tuple[str, list[Prediction], InputError | None]:
    """Predict for a batch of lines, up to the first one that cannot be used.

    kind: what error messages call a line. before: number of lines before this batch.

    Returns the text to write, the predictions, and the error of the bad line, or None. Every source
    has ``search.nbest`` lines of text; they are empty where fewer targets were found.
    """
    sources: list[Symbols] = []
    problem: InputError | None = None
    for number, text in enumerate(batch, start=before + 1):
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
    predictions = predictor.predict(sources, output.search, alignments=output.weights)
    lines = []
    for best in predictions:
        for prediction in best.alternatives:
            score = f"{prediction.ranking_score:.4f}\t" if output.scores else ""
            lines.append(score + _text(prediction, predictor, output))
        lines += [""] * (output.search.nbest - len(best.alternatives))
    written = "".join(f"{line}\n" for line in lines)
    return written, predictions, problem


def _text(prediction: Prediction, predictor: Predictor, output: _Output) -> str:
    if not output.replace_unknown:
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
            raise InputError("--alignments: nothing to draw, all targets are empty")
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
