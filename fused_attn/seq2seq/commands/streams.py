"""Standard input, output and error in UTF-8, whatever the locale says."""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# Name of the error handler for output.
_SHOW_BYTES = "fused_attn.show_bytes"


@contextmanager
def utf8_streams() -> Iterator[None]:
    """Read and write the standard streams in UTF-8; their encodings are restored at the end.

    Writing never raises UnicodeEncodeError. Reading keeps bytes that are not UTF-8 as surrogates.
    Streams that are not text over bytes, such as a StringIO, stay as they are.
    """
    changed: list[tuple[io.TextIOWrapper, str, str | None]] = []
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, _SHOW_BYTES),
        (sys.stderr, _SHOW_BYTES),
    ):
        if not isinstance(stream, io.TextIOWrapper) or stream.closed:
            continue
        before = (stream, stream.encoding, stream.errors)
        with suppress(io.UnsupportedOperation):  # something has read from it already
            stream.reconfigure(encoding="utf-8", errors=errors)
            changed.append(before)
    try:
        yield
    finally:
        for stream, encoding, before_errors in changed:
            with suppress(OSError, ValueError):  # it was read from, or closed, or its reader left
                stream.reconfigure(encoding=encoding, errors=before_errors)


def argument_bytes(text: str) -> bytes:
    """Return the bytes of an argument as it was typed.

    Python decodes arguments with the encoding of the locale.
    """
    try:
        return os.fsencode(text)
    except UnicodeEncodeError:  # not from the command line, but from a call of `main`
        return text.encode("utf-8", "surrogatepass")


def _show_bytes(error: UnicodeError) -> tuple[str | bytes, int]:
    """Write the bytes that surrogates stand for if they are UTF-8, else escapes like ``\\udcff``.

    File names have such surrogates in a locale that is not UTF-8.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end]
    try:
        return found.encode("utf-8", "surrogateescape").decode().encode(), error.end
    except UnicodeError:
        return found.encode("ascii", "backslashreplace"), error.end


codecs.register_error(_SHOW_BYTES, _show_bytes)
