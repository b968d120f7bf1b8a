"""Texts as users write them: Unicode normalization, decoding, and quoting in messages."""

from __future__ import annotations

import unicodedata
from typing import Literal, cast, get_args

Form = Literal["NFC", "NFD", "NFKC", "NFKD"]
# Normalization forms of Unicode. None reads a text as it is.
FORMS: tuple[str, ...] = get_args(Form)
BYTE_ORDER_MARK = "\ufeff"
_QUOTED = 60  # characters of a value that a message shows


class BadEntry(ValueError):
    """An entry of the data cannot be used.

    hint: what helps besides skipping the entry, with options as they are typed; None for nothing.
    """

    def __init__(self, reason: str, hint: str | None = None) -> None:
        super().__init__(reason)
        self.hint = hint


def cleaned(text: str, form: str | None = "NFC") -> str:
    """Return a text in a normalization form, without byte order marks in front.

    A text of white space, control and format characters only becomes "". Without a form the text
    is returned unchanged.
    """
    if form is None:
        return text
    text = unicodedata.normalize(cast(Form, form), text.lstrip(BYTE_ORDER_MARK))
    return text if any(map(_is_visible, text)) else ""


def _is_visible(character: str) -> bool:
    return not (character.isspace() or unicodedata.category(character) in ("Cc", "Cf"))


def decoded(raw: bytes) -> str:
    """Return UTF-8 text; raises `BadEntry` if it is not UTF-8, or has a NUL character."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        guess = quoted(raw.decode("latin-1"))
        raise BadEntry(
            f"not UTF-8 text (byte {error.start + 1}); if it is Latin-1 ({guess}), "
            f"{_convert('LATIN1')}"
        ) from None
    if "\0" in text:
        place = raw.index(0)
        order = "LE" if place % 2 else "BE"
        raise BadEntry(
            f"a NUL character (byte {place + 1}), which text does not have; if the file is UTF-16, "
            f"{_convert(f'UTF-16{order}')}"
        )
    return text


def other_encoding(start: bytes) -> str | None:
    """Return why a file that begins with these bytes is not UTF-8, or None."""
    for mark, name in (
        (b"\xff\xfe\0\0", "UTF-32"),
        (b"\0\0\xfe\xff", "UTF-32"),
        (b"\xff\xfe", "UTF-16"),
        (b"\xfe\xff", "UTF-16"),
    ):
        if start.startswith(mark):
            return f"not UTF-8 text but {name}; {_convert(name)}"
    return None


def _convert(encoding: str) -> str:
    return f"convert the file: iconv -f {encoding} -t UTF-8 FILE > NEW"


def quoted(value: object) -> str:
    """Return a value as Python writes it, shortened."""
    text = repr(value)
    if len(text) <= _QUOTED:
        return text
    end = text[-1] if isinstance(value, str | bytes) else ""
    return f"{text[: _QUOTED - 3 - len(end)]}...{end}"


def counted(number: int, unit: str) -> str:
    """Return a number with the name of what it counts, in the plural if needed."""
    return f"{number:,} {unit}{'' if number == 1 else 's'}"
