"""Read sources: texts or tokens, as the ids that a model takes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from fused_attn.seq2seq.data.texts import counted, quoted
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.tasks.base import Task
from fused_attn.seq2seq.vocabulary import UNKNOWN, UnknownSymbolError, Vocabulary

# Most symbols that an error message lists.
_SHOWN_KNOWN = 60

# A text, or a sequence of tokens of the vocabulary.
Source = str | Sequence[str]
_SHOWN = 4  # most unknown symbols in a note


@dataclass(frozen=True)
class EncodedSource:
    """A source that the model can read: its text, its tokens and their ids."""

    text: str
    tokens: tuple[str, ...]
    ids: list[int]


class SourceReader:
    """Reads texts and sequences of tokens.

    Args:
        vocabulary: of the sources.
        task: converts texts to tokens.
        longest_source: number of symbols of the longest source of the training, None if unknown.
        most: largest number of symbols that the model can read; None for any number.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        task: Task,
        longest_source: int | None,
        most: int | None,
    ) -> None:
        self.task = task
        self.longest_source = longest_source
        self._vocabulary = vocabulary
        self._most = most

    def read(self, source: Source) -> tuple[str, ...]:
        """Return the tokens of a text, or a sequence of tokens as a tuple.

        Raises `InputError` for anything else.
        """
        if isinstance(source, str):
            return self.task.read(source)
        if isinstance(source, (bytes, Mapping, Set)) or not isinstance(source, Iterable):
            kind = type(source).__name__
            raise InputError(f"expected a text or a sequence of tokens, got {kind}")
        tokens = tuple(source)
        for number, token in enumerate(tokens, start=1):
            if not isinstance(token, str):
                raise InputError(f"token {number} is not a str but {type(token).__name__}")
        return tokens

    def encode(self, tokens: Sequence[str]) -> list[int]:
        """Return the ids of source tokens.

        Raises `InputError` if there are none, more than the model reads, or an unknown one.
        """
        if not tokens:
            raise InputError("the source is empty")
        if self._most is not None and len(tokens) > self._most:
            raise InputError(
                f"the source has {len(tokens)} symbols; the model reads at most {self._most}"
            )
        try:
            return self._vocabulary.encode(tokens)
        except UnknownSymbolError as error:
            known = " ".join(self._vocabulary.symbols[:_SHOWN_KNOWN])
            known += " ..." if len(self._vocabulary.symbols) > _SHOWN_KNOWN else ""
            raise InputError(f"unknown symbol {error.symbol!r}; known symbols: {known}") from None

    def read_all(self, sources: Sequence[Source], before: int = 0) -> list[EncodedSource]:
        """Read and encode texts or sequences of tokens; raises `InputError` that names the source.

        before: number of sources before these, added to the numbers in error messages.
        """
        alone = len(sources) == 1 and not before
        found = []
        for number, source in enumerate(sources, start=before + 1):
            tokens: tuple[str, ...] | None = None
            try:
                tokens = self.read(source)
                found.append(self._encoded(source, tokens))
            except InputError as error:
                is_text = tokens is None or isinstance(source, str)
                shown = source if is_text else self.task.show(tokens or ())
                name = f"{shown!r}" if alone else f"source {number}, {shown!r}"
                raise InputError(f"{name}: {error}") from None
        return found

    def read_text(self, text: str) -> EncodedSource:
        """Read and encode one text; raises `InputError` that does not name it."""
        return self._encoded(text, self.read(text))

    def _encoded(self, source: Source, tokens: tuple[str, ...]) -> EncodedSource:
        ids = self.encode(tokens)
        text = source if isinstance(source, str) else self.task.show(tokens)
        return EncodedSource(text, tokens, ids)

    def long_note(self, name: str, source: EncodedSource) -> str | None:
        """Return a note about a source that is longer than those of the training; None for others.

        name: what the note calls the source.
        """
        longest, count = self.longest_source, len(source.tokens)
        if longest is None or count <= longest:
            return None
        return (
            f"{name} has {count} symbols; the longest source of the training had {longest}: "
            "its target may be incomplete"
        )

    def unknown_note(self, name: str, source: EncodedSource) -> str | None:
        """Return a note about the symbols that are read as `UNKNOWN`; None if there are none.

        name: what the note calls the source.
        """
        found = list(dict.fromkeys(s for s in source.tokens if s not in self._vocabulary))
        if not found:
            return None
        shown = " ".join(map(quoted, found[:_SHOWN])) + (" ..." if len(found) > _SHOWN else "")
        return f"{name} has {counted(len(found), 'unknown symbol')}, read as {UNKNOWN}: {shown}"

    def notes(self, name: str, source: EncodedSource) -> list[str]:
        """Return the notes about a source; name: what they call it."""
        found = self.unknown_note(name, source), self.long_note(name, source)
        return [note for note in found if note is not None]

    def warn_of_long(self, sources: Sequence[EncodedSource], before: int = 0) -> bool:
        """Warn the caller's caller once of sources that are too long; returns whether it did.

        before: number of sources before these.
        """
        notes = [self.long_note(f"source {n}", s) for n, s in enumerate(sources, before + 1)]
        long = [note for note in notes if note is not None]
        if not long:
            return False
        more = f" (and {len(long) - 1} more)" if len(long) > 1 else ""
        warnings.warn(f"{long[0]}{more}", stacklevel=3)
        return True
