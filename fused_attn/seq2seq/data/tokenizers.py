"""What the symbols of a text are: its words, its characters, or subwords learned from a corpus."""

from __future__ import annotations

import base64
import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from typing import Any

from fused_attn.seq2seq.data.pairs import Symbols
from fused_attn.seq2seq.errors import OptionError

# What a symbol is. "subwords" are those of SentencePiece (Kudo & Richardson 2018).
TOKENS = ("words", "chars", "subwords")
# Stands for a space where symbols are not words.
SPACE = "▁"


class Tokenizer(ABC):
    """Text to symbols and back."""

    @abstractmethod
    def split(self, text: str) -> Symbols:
        """The symbols of a text."""

    @abstractmethod
    def join(self, symbols: Iterable[str]) -> str:
        """The text of symbols."""


class Words(Tokenizer):
    """What is between white space."""

    def split(self, text: str) -> Symbols:
        return tuple(text.split())

    def join(self, symbols: Iterable[str]) -> str:
        return " ".join(symbols)


class Characters(Tokenizer):
    """Code points; white space of any kind and length is one."""

    def split(self, text: str) -> Symbols:
        return tuple(SPACE.join(text.split()))

    def join(self, symbols: Iterable[str]) -> str:
        return "".join(symbols).replace(SPACE, " ")


class Subwords(Tokenizer):
    """Pieces of words by a SentencePiece model.

    model: its bytes in base64, as they stand in a checkpoint.
    """

    def __init__(self, model: str) -> None:
        self._model = model

    @cached_property
    def _processor(self) -> Any:
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_proto=base64.b64decode(self._model))

    @property
    def pieces(self) -> list[str]:
        """All that can come of a text, but for the one for unknown characters."""
        processor = self._processor
        numbers = range(processor.get_piece_size())
        special = (processor.is_unknown, processor.is_control)
        return [processor.id_to_piece(n) for n in numbers if not any(kind(n) for kind in special)]

    def split(self, text: str) -> Symbols:
        return tuple(self._processor.encode(text, out_type=str))

    def join(self, symbols: Iterable[str]) -> str:
        return "".join(symbols).replace(SPACE, " ").strip()


def learn_subwords(lines: Iterator[str], size: int) -> str:
    """Learn a unigram model of about ``size`` pieces, for `Subwords`; raises `InputError`.

    At most 2 million lines, drawn at random, are used.
    """
    import sentencepiece

    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=written,
            vocab_size=size,
            hard_vocab_limit=False,  # a small corpus has fewer
            character_coverage=0.9995,
            input_sentence_size=2_000_000,
            shuffle_input_sentence=True,
            bos_id=-1,
            eos_id=-1,
            num_threads=1,  # the same pieces every time
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[-1]
        raise OptionError("vocabulary", f"{size}: no subwords can be learned: {reason}") from None
    return base64.b64encode(written.getvalue()).decode()


@lru_cache(maxsize=8)
def make_tokenizer(tokens: str, subwords: str | None) -> Tokenizer:
    """The tokenizer of this name; ``subwords`` is the model of "subwords"."""
    if tokens == "words":
        return Words()
    if tokens == "chars":
        return Characters()
    assert subwords is not None
    return Subwords(subwords)
