"""Tasks on the user's own texts: pairs and translation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from fused_attn.seq2seq.config import ModelConfig, TrainingConfig
from fused_attn.seq2seq.data.pair_files import PairFile, PairList, PairSource, Reader, frequent
from fused_attn.seq2seq.data.pairs import (
    DEV_SHARE,
    Data,
    Item,
    Pair,
    Symbols,
    fingerprint,
    grouped,
    unit_hash,
)
from fused_attn.seq2seq.data.texts import FORMS, cleaned, counted, quoted
from fused_attn.seq2seq.data.tokenizers import TOKENS, Subwords, learn_subwords, make_tokenizer
from fused_attn.seq2seq.errors import InputError, OptionError
from fused_attn.seq2seq.tasks.base import Task
from fused_attn.seq2seq.vocabulary import UNKNOWN, Vocabulary

# Largest development set taken from the training pairs.
DEV_PAIRS = 2_000
# Smallest number of sources to hold out. With fewer, the training pairs are the development set.
LEAST_DEV = 10


@dataclass(frozen=True)
class TextConfig:
    """Options of the tasks on texts.

    tokens: what a symbol is: "words", "chars" or "subwords".
    vocabulary: number of subwords to learn.
    subwords: the SentencePiece model in base64, once learned.
    min_count: words or characters that occur less often become the unknown symbol.
    max_length: longest source or target allowed, in symbols.
    skip_bad: skip and count lines that cannot be used, instead of stopping at the first.
    normalization: the Unicode normalization form of all texts, see `texts.cleaned`; None reads
        texts as they are, as earlier versions did.
    least_dev: smallest number of sources to hold out as the development set. If 2 % of them are
        fewer, nothing is held out. 0 stands for a run of an earlier version: it always holds out
        one, reads any third column as links, and refuses a target of only unknown symbols.
    """

    # Values of the fields that checkpoints of earlier versions lack.
    if_absent: ClassVar[Mapping[str, Any]] = {"normalization": None, "least_dev": 0}

    tokens: str = "words"
    vocabulary: int = 8_000
    subwords: str | None = None
    min_count: int = 1
    max_length: int = 200
    skip_bad: bool = False
    normalization: str | None = "NFC"
    least_dev: int = LEAST_DEV

    def __post_init__(self) -> None:
        _check_tokens("tokens", self.tokens)
        if self.normalization not in (*FORMS, None):
            raise ValueError(
                f"normalization must be one of {', '.join(FORMS)} or None, "
                f"got {quoted(self.normalization)}"
            )
        if self.least_dev < 0:
            raise ValueError(f"least_dev must be at least 0, got {self.least_dev}")
        for name in ("vocabulary", "min_count", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


def _check_tokens(name: str, tokens: str) -> None:
    if tokens not in TOKENS:
        raise ValueError(f"{name} must be one of {', '.join(TOKENS)}, got {quoted(tokens)}")


def check_name(name: str, value: str | None) -> None:
    """Raise ValueError unless the value of a field is a str, or None."""
    if not isinstance(value, str | None):
        raise ValueError(f"{name} must be a str, got {quoted(value)}")


def held_out(number: int, pairs: int) -> str:
    """Return what a note says about a development set of this number of all pairs."""
    share = f"{100 * number / pairs:.1f} %"
    return f"held out {number:,} of {counted(pairs, 'pair')} ({share}) as the development set"


def nothing_held_out(pairs: str) -> str:
    """Return what a note says if the training pairs are the development set."""
    return (
        f"too small to hold out a development set, so the training pairs ({pairs}) are also the "
        "development set"
    )


class TextTask(Task):
    """A task on texts, with one tokenizer for sources and one for targets."""

    config: TextConfig

    @property
    def tokens(self) -> tuple[str, str]:
        """The kind of symbols of sources and of targets, each one of `TOKENS`."""
        return self.config.tokens, self.config.tokens

    @property
    def reader(self) -> Reader:
        """How texts become pairs."""
        config = self.config
        source, target = (
            make_tokenizer(tokens, config.subwords, config.normalization) for tokens in self.tokens
        )
        return Reader(source, target, config.max_length, config.skip_bad)

    def learn(self, texts: Iterable[tuple[str, ...]]) -> None:
        """Learn the subword model, if the task needs one and has none yet.

        texts: the source and the target of each pair. Raises `InputError` if learning fails.
        """
        if "subwords" in self.tokens and self.config.subwords is None:
            lines = (
                cleaned(text, self.config.normalization)
                for pair in texts
                for text, tokens in zip(pair, self.tokens, strict=True)
                if tokens == "subwords" and text.strip()
            )
            model = learn_subwords(lines, self.config.vocabulary)
            self.config = replace(self.config, subwords=model)

    def vocabularies(self, pairs: Iterable[Pair]) -> tuple[Vocabulary, Vocabulary]:
        """Return the source and target vocabularies: the subwords, or the symbols of the pairs."""
        tokenizers = self.reader.source, self.reader.target
        counts: tuple[Counter[str], Counter[str]] = Counter(), Counter()
        if not all(isinstance(tokenizer, Subwords) for tokenizer in tokenizers):
            for pair in pairs:
                for count, symbols in zip(counts, pair[:2], strict=True):
                    count.update(symbols)
        source, target = (
            Vocabulary([UNKNOWN, *tokenizer.pieces])
            if isinstance(tokenizer, Subwords)
            else Vocabulary(frequent(count, self.config.min_count))
            for tokenizer, count in zip(tokenizers, counts, strict=True)
        )
        return source, target

    def read(self, text: str) -> Symbols:
        return self.reader.source.split(text)

    def read_target(self, text: str) -> Symbols:
        return self.reader.target.split(text)

    def write(self, target: Iterable[str]) -> str:
        return self.reader.target.join(target)

    def show(self, source: Iterable[str]) -> str:
        return self.reader.source.join(source)

    def listed(self, path: Path) -> tuple[list[Item], list[str]]:
        pairs = PairFile(str(path), replace(self.reader, trains=False), read_once=True)
        return grouped(pairs), pairs.notes()


@dataclass(frozen=True)
class PairsConfig(TextConfig):
    """Options of the task pairs, besides those of `TextConfig`.

    train, dev, test: files, see `PairFile`, or None if the pairs are given in Python. Without a dev
        file, 2 % of the training pairs, at most 2,000, are held out for development; or none, see
        ``least_dev``.
    source_tokens, target_tokens: ``tokens`` for the sources and for the targets, if they differ;
        None means ``tokens``.
    """

    train: str | None = None
    dev: str | None = None
    test: str | None = None
    source_tokens: str | None = None
    target_tokens: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("source_tokens", "target_tokens"):
            if getattr(self, name) is not None:
                _check_tokens(name, getattr(self, name))
        for name in ("train", "dev", "test"):
            check_name(name, getattr(self, name))


class Pairs(TextTask):
    """The user's own pairs: lines SOURCE TAB TARGET, or pairs given in Python.

    given: pairs for "train", "dev" and "test", used instead of the files in the configuration.
    """

    name, kind = "pairs", PairsConfig
    units, rates = ("lines", "symbols"), ("lines wrong", "symbols wrong")
    only_trained_on = ("train", "dev", "test")
    config: PairsConfig

    def __init__(self, config: Any, given: Mapping[str, Sequence[Any]] | None = None) -> None:
        super().__init__(config)
        self.given = dict(given or {})

    @property
    def tokens(self) -> tuple[str, str]:
        config = self.config
        return config.source_tokens or config.tokens, config.target_tokens or config.tokens

    @property
    def has_data(self) -> bool:
        return "train" in self.given or self.config.train is not None

    def load(self, *, links: bool = False) -> Data:
        texts = self._pairs("train", Reader(skip_bad=True))
        if texts is None:
            raise OptionError(
                "train",
                "must name a file of pairs (if seq2seq.fit started this run, resume it with "
                "seq2seq.fit(..., resume=True))",
            )
        self.learn(texts.texts())
        reader = replace(self.reader, links=links or self._is_earlier)
        train = self._pairs("train", reader)
        assert train is not None
        notes: list[str] = []
        dev, test = (self._items(split, reader, notes) for split in ("dev", "test"))
        holds_out = dev is None
        if dev is None:
            dev = self._dev_of(train)
        source, target = self.vocabularies(train)
        known = set(target.symbols)
        if self._is_earlier:
            train.known = known
        # This pass also reports bad entries, before training begins.
        unknown = self._about_unknown(train, known)
        if not train.used:
            raise InputError(f"{train.name}: too few {train.unit}s for training and development")
        own = [*train.notes(), *([self._about_dev(train)] if holds_out else []), *unknown]
        digest = self._fingerprint(train)
        return Data(source, target, train, dev, test or [], digest, (*own, *notes))

    @property
    def _is_earlier(self) -> bool:
        """Whether an earlier version started the run, whose pairs must stay the same."""
        return self.config.least_dev == 0

    def _about_unknown(self, train: PairSource, known: Set[str]) -> list[str]:
        """The note about targets without a known symbol, if there are any."""
        count = sum(known.isdisjoint(pair.target) for pair in train)
        if not count:
            return []
        hint = "; a smaller --min-count keeps more" if self.config.min_count > 1 else ""
        return [f"{train.name}: {counted(count, 'target')} with only unknown symbols{hint}"]

    def _dev_of(self, train: PairSource) -> list[Item]:
        """Hold out a development set, or return the training pairs if it would be too small."""
        chosen = (pair for pair in train if unit_hash(pair.source) < DEV_SHARE)
        dev = grouped(islice(chosen, DEV_PAIRS))
        if len(dev) < self.config.least_dev:
            return grouped(islice(train, DEV_PAIRS))
        dev = dev or grouped(islice(train, 1))
        train.without = {item.source for item in dev}
        return dev

    def _about_dev(self, train: PairSource) -> str:
        """A note about the development set that `_dev_of` returned, after a pass."""
        pairs = train.used + train.held_out
        if train.without:
            return f"{train.name}: {held_out(train.held_out, pairs)}; --dev names another"
        what = f"its first {DEV_PAIRS:,} pairs" if pairs > DEV_PAIRS else counted(pairs, "pair")
        return f"{train.name}: {nothing_held_out(what)}; --dev names another"

    def with_vocabularies(self, data: Data, source: Vocabulary, target: Vocabulary) -> Data:
        train = data.train
        assert isinstance(train, PairSource)
        if self._is_earlier:
            train.known = set(target.symbols)
        elif target.symbols != data.target.symbols:
            if isinstance(self.reader.target, Subwords):  # whose vocabulary stays that of the model
                train.known = set(target.symbols)
            elif self.config.min_count > 1:  # the model knows symbols that are rare in the data
                before = self._about_unknown(train, set(data.target.symbols))
                others = [note for note in data.notes if note not in before]
                data = replace(
                    data, notes=(*others, *self._about_unknown(train, set(target.symbols)))
                )
        return super().with_vocabularies(data, source, target)

    def _pairs(self, split: str, reader: Reader) -> PairSource | None:
        """The pairs of a split, from Python or from a file; None if the split is not given."""
        if split in self.given:
            return PairList({"train": "pairs"}.get(split, split), self.given[split], reader)
        name = getattr(self.config, split)
        return None if name is None else PairFile(name, reader)

    def _items(self, split: str, reader: Reader, notes: list[str]) -> list[Item] | None:
        pairs = self._pairs(split, reader)
        if pairs is None:
            return None
        items = grouped(pairs)
        notes += pairs.notes()
        return items

    def _fingerprint(self, train: PairSource) -> str:
        """A digest of all pairs and of the choice of those held out."""
        held = "\n".join(sorted(" ".join(source) for source in train.without))
        if "dev" in self.given:
            held = fingerprint(PairList("dev", self.given["dev"], train.reader))
        return fingerprint([Pair((train.fingerprint(), held), ())])

    @classmethod
    def test_option(cls, path: Path) -> dict[str, Any]:
        return {"test": str(path)}


@dataclass(frozen=True)
class TranslateConfig(PairsConfig):
    """`PairsConfig` with other defaults: subwords and a shorter ``max_length``."""

    tokens: str = "subwords"
    max_length: int = 100


class Translate(Pairs):
    """Sentences to sentences in another language; checkpoints are chosen by BLEU."""

    name, kind = "translate", TranslateConfig
    units = ("sentences", "symbols")
    rates = ("sentences wrong", "symbols wrong")
    model = ModelConfig(hidden=512, embedding=256, input_feeding=True, dropout=0.3)
    training = TrainingConfig(epochs=12, batch_tokens=4_000, lr=1e-3, label_smoothing=0.1)

    def quality(self, found: Sequence[Symbols], items: Sequence[Item]) -> dict[str, float]:
        """Return BLEU and chrF against the first reference of each item, with the defaults of
        sacrebleu, divided by 100.
        """
        import sacrebleu

        texts = [self.write(target) for target in found]
        references = [[self.write(item.references[0]) for item in items]]
        return {
            "BLEU": sacrebleu.corpus_bleu(texts, references).score / 100,
            "chrF": sacrebleu.corpus_chrf(texts, references).score / 100,
        }
