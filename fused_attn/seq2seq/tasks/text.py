"""Tasks on text in files: your own pairs, and translation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from fused_attn.seq2seq.config import ModelConfig, TrainingConfig
from fused_attn.seq2seq.data.pair_files import PairFile, Reader, frequent
from fused_attn.seq2seq.data.pairs import (
    DEV_SHARE,
    Data,
    Item,
    Pair,
    Symbols,
    fingerprint,
    grouped,
    place,
)
from fused_attn.seq2seq.data.tokenizers import TOKENS, Subwords, learn_subwords, make_tokenizer
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.tasks.base import Task
from fused_attn.seq2seq.vocabulary import UNKNOWN, Vocabulary

# Of a development set that is taken from the training pairs.
_DEV_PAIRS = 2_000


@dataclass(frozen=True)
class TextConfig:
    """tokens: what a symbol is, see `tokens`.
    vocabulary: subwords to learn.
    subwords: the model of them, once it is learned.
    min_count: rarer words or characters are one symbol, the unknown.
    max_length: longest source or target in symbols.
    skip_bad: leave out lines that cannot be used, and count them, instead of stopping at the first.
    """

    tokens: str = "words"
    vocabulary: int = 8_000
    subwords: str | None = None
    min_count: int = 1
    max_length: int = 200
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if self.tokens not in TOKENS:
            raise ValueError(f"tokens must be one of {', '.join(TOKENS)}, got {self.tokens!r}")
        for name in ("vocabulary", "min_count", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


class TextTask(Task):
    """A task whose lines a `Tokenizer` splits."""

    config: TextConfig

    @property
    def reader(self) -> Reader:
        """How its lines become pairs."""
        config = self.config
        tokenizer = make_tokenizer(config.tokens, config.subwords)
        return Reader(tokenizer, config.max_length, config.skip_bad)

    def learn(self, lines: Iterator[str]) -> None:
        """Learn the subwords, if they are wanted and not known yet."""
        if self.config.tokens == "subwords" and self.config.subwords is None:
            model = learn_subwords(lines, self.config.vocabulary)
            self.config = replace(self.config, subwords=model)

    def vocabularies(self, pairs: Iterable[Pair]) -> tuple[Vocabulary, Vocabulary]:
        """Source and target vocabulary: of subwords one for both, or what the pairs have."""
        tokenizer = self.reader.tokenizer
        if isinstance(tokenizer, Subwords):
            both = Vocabulary([UNKNOWN, *tokenizer.pieces])
            return both, both
        counts: tuple[Counter[str], Counter[str]] = Counter(), Counter()
        for pair in pairs:
            for count, symbols in zip(counts, pair[:2], strict=True):
                count.update(symbols)
        source, target = (Vocabulary(frequent(c, self.config.min_count)) for c in counts)
        return source, target

    def read(self, text: str) -> Symbols:
        return self.reader.tokenizer.split(text)

    def write(self, target: Iterable[str]) -> str:
        return self.reader.tokenizer.join(target)

    def show(self, source: Iterable[str]) -> str:
        return self.reader.tokenizer.join(source)

    def listed(self, path: Path) -> tuple[list[Item], list[str]]:
        pairs = PairFile(str(path), self.reader)
        return grouped(pairs), pairs.note()


def _known(vocabulary: Vocabulary) -> set[str]:
    return {symbol for symbol in vocabulary.symbols if symbol != UNKNOWN}


@dataclass(frozen=True)
class PairsConfig(TextConfig):
    """train, dev, test: see `PairFile`; without a dev file 2 % of train, at most 2,000 pairs."""

    train: str | None = None
    dev: str | None = None
    test: str | None = None

    def __post_init__(self) -> None:
        if self.train is None:
            raise ValueError("train must name a file of pairs")
        super().__post_init__()


class Pairs(TextTask):
    """Your own lines: source, a tab, target."""

    name, kind = "pairs", PairsConfig
    units, rates = ("lines", "symbols"), ("lines wrong", "symbols wrong")
    config: PairsConfig

    def load(self) -> Data:
        config = self.config
        assert config.train is not None
        self.learn(PairFile(config.train, self.reader_of_text()).texts())
        train = PairFile(config.train, self.reader)
        notes: list[str] = []
        if config.dev is None:
            chosen = (pair for pair in train if place(pair.source) < DEV_SHARE)
            dev = grouped(list(islice(chosen, _DEV_PAIRS)) or islice(train, 1))
        else:
            dev = self._items(config.dev, notes)
        test = self._items(config.test, notes)
        if config.dev is None:
            train.without = {item.source for item in dev}
        source, target = self.vocabularies(train)
        train.known = _known(target)
        if next(iter(train), None) is None:
            raise InputError(f"{config.train}: too few lines for training and development")
        for _ in train:  # what cannot be used is said before the training begins
            pass
        notes = [*train.note(), *notes]
        return Data(source, target, train, dev, test, self._fingerprint(train), tuple(notes))

    def with_vocabularies(self, data: Data, source: Vocabulary, target: Vocabulary) -> Data:
        assert isinstance(data.train, PairFile)
        data.train.known = _known(target)
        return super().with_vocabularies(data, source, target)

    def reader_of_text(self) -> Reader:
        """A reader for a file of which only the texts are wanted."""
        return Reader(skip_bad=True)

    def _items(self, name: str | None, notes: list[str]) -> list[Item]:
        if name is None:
            return []
        pairs = PairFile(name, self.reader)
        items = grouped(pairs)
        notes += pairs.note()
        return items

    def _fingerprint(self, train: PairFile) -> str:
        """Of the files, and of what of them is trained on."""
        held = "\n".join(sorted(" ".join(source) for source in train.without))
        digest = fingerprint([Pair((train.fingerprint(), held), ())])
        return digest

    @classmethod
    def test_option(cls, path: Path) -> dict[str, Any]:
        return {"test": str(path)}


@dataclass(frozen=True)
class TranslateConfig(PairsConfig):
    """As `PairsConfig`, with subwords."""

    tokens: str = "subwords"
    max_length: int = 100


class Translate(Pairs):
    """Sentences to sentences of another language; the development set is judged by BLEU."""

    name, kind = "translate", TranslateConfig
    units = ("sentences", "symbols")
    rates = ("sentences wrong", "symbols wrong")
    model = ModelConfig(hidden=512, embedding=256, input_feeding=True, dropout=0.3)
    training = TrainingConfig(epochs=12, batch_tokens=4_000, lr=1e-3, label_smoothing=0.1)

    def quality(self, found: Sequence[Symbols], items: Sequence[Item]) -> dict[str, float]:
        """BLEU and chrF of the texts, each against its first reference (sacrebleu's defaults)."""
        import sacrebleu

        texts = [self.write(target) for target in found]
        references = [[self.write(item.references[0]) for item in items]]
        return {
            "BLEU": sacrebleu.corpus_bleu(texts, references).score / 100,
            "chrF": sacrebleu.corpus_chrf(texts, references).score / 100,
        }
