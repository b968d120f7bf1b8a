"""The lines of text files, in UTF-8."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from fused_attn.seq2seq.data.texts import BadEntry, cleaned, decoded, other_encoding, quoted
from fused_attn.seq2seq.errors import InputError

_KINDS = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def check_file(path: str | Path) -> None:
    """Raise `InputError` unless a path names a regular file: one that can be read several times.

    A model names the files that it was trained on. Opening a FIFO among them would wait forever.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    for is_kind, kind in _KINDS:
        if is_kind(mode):
            raise InputError(
                f"cannot read {path}: expected a regular file, which can be read again, got {kind}"
            )


def _unreadable(path: str | Path, error: OSError | ValueError) -> InputError:
    if not str(path):
        return InputError("cannot read '': the name of the file is empty")
    if isinstance(error, OSError):
        return InputError(f"cannot read {path}: {error.strerror}")
    return InputError(f"cannot read {quoted(str(path))}: not a valid file name")


def read_lines(path: str | Path, *, universal: bool = False) -> Iterator[bytes]:
    """Iterate over the lines of a file, without line ends.

    universal: whether CR also ends a line, as LF and CR LF do. Nothing else does.

    Raises `InputError` if the file cannot be read, or is UTF-16 or UTF-32.
    """
    try:
        with ExitStack() as stack:
            file = stack.enter_context(open(path, "rb"))
            for number, line in enumerate(file):
                if not number and (reason := other_encoding(line)):
                    raise InputError(f"{path}, line 1: {reason}")
                line = line.rstrip(b"\r\n")
                if universal and b"\r" in line:
                    yield from line.split(b"\r")
                else:
                    yield line
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def read_numbered(path: Path, form: str | None = "NFC") -> Iterator[tuple[int, str]]:
    """Iterate over the lines of a file as texts in a normalization form, numbered from 1.

    Raises `InputError` with the line number if a line is not UTF-8 text.
    """
    for number, line in enumerate(read_lines(path, universal=form is not None), start=1):
        try:
            text = decoded(line)
        except BadEntry as error:
            raise InputError(f"{path}, line {number}: {error}") from None
        yield number, cleaned(text, form)
