"""Tokenizers: a text as words, as characters, or as subwords learned from a corpus."""

from __future__ import annotations

import base64
import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from typing import Any

from fused_attn.seq2seq.data.pairs import Symbols
from fused_attn.seq2seq.data.texts import cleaned
from fused_attn.seq2seq.errors import InputError, OptionError

# The kinds of symbols. "subwords" are those of SentencePiece (Kudo & Richardson 2018).
TOKENS = ("words", "chars", "subwords")
# Stands for a space in characters and subwords.
SPACE = "▁"


class Tokenizer(ABC):
    """Splits a text into symbols, and joins symbols into a text.

    normalization: the form that texts are put into first, see `cleaned`; None for none.
    """

    def __init__(self, normalization: str | None = "NFC") -> None:
        self.normalization = normalization

    def split(self, text: str) -> Symbols:
        """Return the symbols of a text."""
        return self._split(cleaned(text, self.normalization))

    @abstractmethod
    def _split(self, text: str) -> Symbols:
        """Return the symbols of a normalized text."""

    @abstractmethod
    def join(self, symbols: Iterable[str]) -> str:
        """Return the text that the symbols stand for."""


class Words(Tokenizer):
    """Words separated by white space."""

    def _split(self, text: str) -> Symbols:
        return tuple(text.split())

    def join(self, symbols: Iterable[str]) -> str:
        return " ".join(symbols)


class Characters(Tokenizer):
    """Unicode code points. A run of white space of any kind is one symbol, `SPACE`."""

    def _split(self, text: str) -> Symbols:
        return tuple(SPACE.join(text.split()))

    def join(self, symbols: Iterable[str]) -> str:
        return "".join(symbols).replace(SPACE, " ")


class Subwords(Tokenizer):
    """Subwords of a SentencePiece model.

    model: the bytes of the model in base64, as stored in a checkpoint.
    """

    def __init__(self, model: str, normalization: str | None = "NFC") -> None:
        super().__init__(normalization)
        self._model = model

    @cached_property
    def _processor(self) -> Any:
        from sentencepiece import SentencePieceProcessor

        try:
            if not (model := base64.b64decode(self._model, validate=True)):
                raise ValueError("it is empty")
            processor = SentencePieceProcessor(model_proto=model)
            processor.encode("a", out_type=str)  # some damage shows only here
        except (ValueError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"the subword model is damaged: {reason}") from None
        return processor

    @property
    def pieces(self) -> list[str]:
        """All pieces except the control symbols and the one for unknown characters."""
        processor = self._processor
        numbers = range(processor.get_piece_size())
        special = (processor.is_unknown, processor.is_control)
        return [processor.id_to_piece(n) for n in numbers if not any(kind(n) for kind in special)]

    def _split(self, text: str) -> Symbols:
        try:
            return tuple(self._processor.encode(text, out_type=str))
        except RuntimeError:  # such as half of a surrogate pair
            raise InputError("the subword model cannot split this text") from None

    def join(self, symbols: Iterable[str]) -> str:
        return "".join(symbols).replace(SPACE, " ").strip()


def learn_subwords(lines: Iterator[str], size: int) -> str:
    """Learn a unigram model of about ``size`` pieces; returns it in base64, for `Subwords`.

    lines: normalized texts. At most 2 million of them are used, drawn at random.

    Raises `InputError` if SentencePiece cannot learn that many pieces from the lines.
    """
    import sentencepiece

    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=written,
            vocab_size=size,
            hard_vocab_limit=False,  # a small corpus has fewer pieces
            character_coverage=0.9995,
            input_sentence_size=2_000_000,
            shuffle_input_sentence=True,
            bos_id=-1,
            eos_id=-1,
            num_threads=1,  # deterministic
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[-1]
        raise OptionError("vocabulary", f"{size}: cannot learn subwords: {reason}") from None
    return base64.b64encode(written.getvalue()).decode()


def check_subwords(model: str) -> None:
    """Raise ValueError unless ``model`` is a subword model that can be used, in base64."""
    tokenizer = make_tokenizer("subwords", model)
    assert isinstance(tokenizer, Subwords)
    try:
        pieces = tokenizer.pieces
    except InputError as error:
        raise ValueError(str(error)) from None
    if not pieces:
        raise ValueError("the subword model has no pieces")


@lru_cache(maxsize=8)
def make_tokenizer(
    tokens: str, subwords: str | None, normalization: str | None = "NFC"
) -> Tokenizer:
    """Return the tokenizer for one of `TOKENS`; "subwords" needs its model, ``subwords``."""
    if tokens == "words":
        return Words(normalization)
    if tokens == "chars":
        return Characters(normalization)
    if subwords is None:
        raise InputError("the model has no subword model")
    return Subwords(subwords, normalization)
