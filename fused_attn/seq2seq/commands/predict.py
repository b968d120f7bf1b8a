"""``fused-attn predict``: predict a target for each line, and write alignments."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from fused_attn.seq2seq.commands.alignment_files import AlignmentFile, check_name
from fused_attn.seq2seq.commands.options import (
    load_models,
    note,
    search_config,
    set_threads,
    tell,
)
from fused_attn.seq2seq.commands.parser import INCOMPLETE
from fused_attn.seq2seq.commands.streams import argument_bytes
from fused_attn.seq2seq.commands.tally import Tally
from fused_attn.seq2seq.config import SearchConfig
from fused_attn.seq2seq.data.text_files import read_lines
from fused_attn.seq2seq.data.texts import other_encoding
from fused_attn.seq2seq.errors import InputError, OptionError
from fused_attn.seq2seq.inference.files import BATCH_LINES, Group, predict_file
from fused_attn.seq2seq.inference.prediction import Prediction
from fused_attn.seq2seq.inference.predictor import Predictor
from fused_attn.seq2seq.inference.records import (
    Line,
    answer,
    as_json,
    as_text,
    as_tsv,
    read_line,
    with_unknown_replaced,
)
from fused_attn.seq2seq.outputs import writing
from fused_attn.seq2seq.vocabulary import UNKNOWN

_READ_BYTES = 1 << 16


@dataclass(frozen=True)
class _Output:
    """What to compute and print for each batch of lines."""

    search: SearchConfig
    format: str
    scores: bool
    replace_unknown: bool
    with_alignment: bool
    strict: bool
    weights: bool  # whether anything here needs the attention weights


def run(args: Namespace) -> int:
    """Print a line for each input line as soon as it is predicted, or write all to --output.

    With --input and --output, several processes can share the lines.
    """
    set_threads(args.threads)
    group = Group.of_environment()
    _check_files(args, group)
    search = search_config(args)
    predictor = load_models(args)
    _check_model(args, predictor)
    output = _Output(
        search,
        args.format,
        args.scores,
        args.replace_unknown,
        args.with_alignment,
        args.strict,
        weights=args.alignments is not None or args.replace_unknown or args.with_alignment,
    )
    if args.input is not None and args.output is not None:
        tally = _predict_file(args, predictor, output, group)
    elif args.output is not None:
        tally = _predict_to_file(args, predictor, output)
    else:
        tally = _predict_stream(args, predictor, output, _print)
    if group.rank == 0:
        for text in tally.summary(predictor):
            note(text)
    return INCOMPLETE if tally.unread.count else 0


def _check_files(args: Namespace, group: Group) -> None:
    if args.alignments is not None:
        check_name(args.alignments)
    if args.output is None and sys.stdout is None:
        raise InputError("standard output is closed", "--output FILE writes a file")
    if args.input is not None and args.text:
        raise InputError("--input cannot be combined with TEXT")
    if args.output is not None:
        if args.alignments is not None:
            raise InputError("--output cannot be combined with --alignments")
        if not args.output.parent.is_dir():
            raise InputError(f"--output: there is no directory {args.output.parent}")
    if group.size > 1 and (args.input is None or args.output is None):
        raise InputError("prediction with several processes needs --input and --output")


def _check_model(args: Namespace, predictor: Predictor) -> None:
    has_attention = any(model.config.score != "none" for model in predictor.models)
    for option in ("alignments", "replace_unknown", "with_alignment"):
        if getattr(args, option) and not has_attention:
            name = option.replace("_", "-")
            raise InputError(f"--{name} needs a model with attention, and this one has none")
    if args.replace_unknown and UNKNOWN not in predictor.target.symbols:
        raise OptionError("replace_unknown", f"has no effect: the model never writes {UNKNOWN}")


def _predict_file(args: Namespace, predictor: Predictor, output: _Output, group: Group) -> Tally:
    """Predict for ``args.input``. The notes come at the end, from the first process."""
    own = Tally("line")

    def answer_batch(batch: list[bytes], before: int) -> str:
        lines, _, problem = _read_batch(predictor, batch, before, own, output.strict)
        if problem is not None:
            raise problem
        _, text = _predict_batch(predictor, lines, output)
        # A model may have symbols that UTF-8 cannot encode.
        return text.encode("utf-8", "backslashreplace").decode()

    whole = Tally.joined(predict_file(args.input, args.output, answer_batch, group, lambda: own))
    if group.rank == 0:
        for text in whole.notes:
            note(text)
    return whole


def _predict_to_file(args: Namespace, predictor: Predictor, output: _Output) -> Tally:
    """Predict for the arguments or standard input, and write the targets to ``args.output``."""
    try:
        with writing(args.output) as file:
            return _predict_stream(
                args,
                predictor,
                output,
                lambda text: file.write(text.encode("utf-8", "backslashreplace")),
            )
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InputError(f"cannot write {args.output}: {error.strerror}") from None


def _print(text: str) -> None:
    print(text, end="", flush=True)


def _predict_stream(
    args: Namespace, predictor: Predictor, output: _Output, write: Callable[[str], object]
) -> Tally:
    """Predict for the sources in batches, writing notes and targets as they come."""
    file = None if args.alignments is None else AlignmentFile(args.alignments)
    tally = Tally("argument" if args.text else "line")
    for batch in _batches(args):
        lines, notes, problem = _read_batch(predictor, batch, tally.total, tally, output.strict)
        for text in notes:
            note(text)
        predictions, written = _predict_batch(predictor, lines, output)
        write(written)
        if problem is not None:
            raise problem
        if file is not None:
            file.add(predictions)
    if file is not None and (told := file.write()):
        tell(told)
    return tally


def _batches(args: Namespace) -> Iterator[list[bytes]]:
    """Yield the sources in batches."""
    if args.text:
        yield [argument_bytes(text) for text in args.text]
    elif args.input is not None:
        lines = read_lines(args.input)
        while batch := list(islice(lines, BATCH_LINES)):
            yield batch
    elif sys.stdin is None:
        raise InputError("there is no TEXT, and standard input is closed")
    else:
        try:
            descriptor = sys.stdin.fileno()
        except (OSError, ValueError):  # not a file, as in a test or a notebook
            data = sys.stdin.read().encode("utf-8", "surrogatepass")
            yield data.removesuffix(b"\n").split(b"\n") if data else []
            return
        for number, batch in enumerate(_available_lines(descriptor)):
            if not number and (reason := other_encoding(batch[0])):
                raise InputError(f"standard input, line 1: {reason}")
            yield batch


def _available_lines(descriptor: int) -> Iterator[list[bytes]]:
    """Yield the lines of standard input as they arrive; those of one read form a batch."""
    rest = b""
    while data := _read(descriptor):
        *lines, rest = (rest + data).split(b"\n")
        if lines:
            yield lines
    if rest:
        yield [rest]


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, _READ_BYTES)
    except OSError as error:
        raise InputError(f"cannot read standard input: {error.strerror}") from None


def _read_batch(
    predictor: Predictor, batch: Sequence[bytes], before: int, tally: Tally, strict: bool
) -> tuple[list[Line], list[str], InputError | None]:
    """Read a batch of lines and count them; if ``strict``, up to the first without a source.

    before: number of lines before this batch.

    Returns the lines, the notes about them, and the error of the line that is not used, or None.
    """
    lines: list[Line] = []
    notes: list[str] = []
    for number, data in enumerate(batch, start=before + 1):
        line = read_line(predictor, data)
        if strict and line.source is None:
            return lines, notes, InputError(line.problem(f"{tally.unit} {number}"))
        notes += tally.add(number, line, predictor)
        lines.append(line)
    return lines, notes, None


def _predict_batch(
    predictor: Predictor, lines: Sequence[Line], output: _Output
) -> tuple[list[Prediction | None], str]:
    """Return the prediction for each line, None without a source, and the text to write."""
    predictions = answer(predictor, lines, output.search, alignments=output.weights)
    written: list[str] = []
    for line, found in zip(lines, predictions, strict=True):
        written += _written(line, found, predictor, output)
    return predictions, "".join(f"{text}\n" for text in written)


def _written(
    line: Line, found: Prediction | None, predictor: Predictor, output: _Output
) -> list[str]:
    """The lines to write for a line of input."""
    if output.replace_unknown and found is not None:
        found = with_unknown_replaced(found, predictor.task)
    if output.format == "json":
        return [as_json(line, found, output.with_alignment)]
    if output.format == "tsv":
        return as_tsv(line, found, output.with_alignment)
    return as_text(found, output.search.most, output.scores)
