"""The tasks that come with the toolkit."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fused_attn.seq2seq.config import ModelConfig, TrainingConfig
from fused_attn.seq2seq.data import pair_files as parallel
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.tasks import cmudict as g2p
from fused_attn.seq2seq.tasks import scan_grammar as scan
from fused_attn.seq2seq.tasks.base import (
    DEV_SHARE,
    TEST_SHARE,
    Data,
    Item,
    Pair,
    Symbols,
    Task,
    fingerprint,
    grouped,
    place,
)
from fused_attn.seq2seq.tasks.text import Chat, Pairs, Translate
from fused_attn.seq2seq.vocabulary import Vocabulary


@dataclass(frozen=True)
class G2PConfig:
    """test_words: words to keep for the test; None to choose them by hash.
    limit_words: use only so many words for training and development; None for all.
    lexicon: a file of more words to train on, see `g2p.read_lexicon`; None for those alone.
    """

    test_words: Symbols | None = None
    limit_words: int | None = None
    lexicon: str | None = None

    def __post_init__(self) -> None:
        if self.limit_words is not None and self.limit_words < 1:
            raise ValueError(f"limit_words must be a positive number, got {self.limit_words}")


class G2P(Task):
    """Letters to phones: the CMU pronouncing dictionary."""

    name, kind = "g2p", G2PConfig
    units, rates = ("words", "phones"), ("WER", "PER")
    only_trained_on = ("lexicon",)

    def load(self) -> Data:
        lexicon = g2p.load_dictionary()
        split = g2p.split_words(lexicon, self.config.test_words, self.config.limit_words)
        phones = g2p.phones(lexicon)
        pairs = [Pair(tuple(word), variant) for word in split.train for variant in lexicon[word]]
        notes: list[str] = []
        if self.config.lexicon is not None:
            pairs += self._more(Path(self.config.lexicon), phones, split, set(pairs), notes)
        dev, test = (
            [Item(tuple(word), lexicon[word]) for word in words]
            for words in (split.dev, split.test)
        )
        letters, targets = Vocabulary(g2p.LETTERS), Vocabulary(phones)
        return Data(letters, targets, pairs, dev, test, fingerprint(pairs), tuple(notes))

    def _more(
        self,
        path: Path,
        phones: Sequence[str],
        split: g2p.Split,
        known: Collection[Pair],
        notes: list[str],
    ) -> list[Pair]:
        """The pairs of a lexicon that are not known yet, without the words to judge on."""
        more = g2p.read_lexicon(path, phones)
        judged = set(self.config.test_words or ()).union(split.dev, split.test)
        if left_out := len(more.keys() & judged):
            notes.append(f"{path}: {left_out} words are kept for development and test")
        found = [
            Pair(tuple(w), v) for w, variants in more.items() if w not in judged for v in variants
        ]
        return [pair for pair in found if pair not in known]

    @classmethod
    def test_option(cls, path: Path) -> dict[str, Any]:
        return {"test_words": tuple(sorted(set(g2p.read_words(path))))}

    def read(self, text: str) -> Symbols:
        return tuple(text.strip().lower())

    def show(self, source: Iterable[str]) -> str:
        return "".join(source)

    def listed(self, path: Path) -> tuple[list[Item], list[str]]:
        lexicon = g2p.load_dictionary()
        listed = sorted(set(g2p.read_words(path)))
        words = [word for word in listed if word in lexicon]
        if not words:
            raise InputError(f"none of the words in {path} is in the dictionary")
        unknown = len(listed) - len(words)
        notes = [f"{unknown} listed words are not in the dictionary"] if unknown else []
        return [Item(tuple(word), lexicon[word]) for word in words], notes


@dataclass(frozen=True)
class ScanConfig:
    """split: of the commands, see `scan`.
    test_commands: those to keep for the test of the split "simple"; None to choose them by hash.
    """

    split: str = "simple"
    test_commands: Symbols | None = None

    def __post_init__(self) -> None:
        if self.split not in scan.SPLITS:
            raise ValueError(f"split must be one of {', '.join(scan.SPLITS)}, got {self.split!r}")
        if self.test_commands is not None and self.split != "simple":
            raise ValueError(f"test goes with the split simple, got {self.split!r}")


class Scan(Task):
    """Commands to actions (Lake & Baroni 2018), generated from the grammar."""

    name, kind = "scan", ScanConfig
    units, rates = ("commands", "actions"), ("commands wrong", "actions wrong")
    model = ModelConfig(hidden=128, embedding=64, dropout=0.1)
    training = TrainingConfig(epochs=10, batch_size=64, bucket=False, lr=4e-3)

    def load(self) -> Data:
        every = scan.commands()
        if self.config.split == "simple":
            train, test = self._simple(every)
        else:
            train, test = scan.split_commands(self.config.split)
        copies = Counter(source for source, _ in train)
        # What is there in copies is there to be learned.
        held = {s for s, count in copies.items() if count == 1 and place(s) < DEV_SHARE}
        dev = [pair for pair in every if pair[0] in held]
        words = sorted({word for source, _ in every for word in source})
        actions = sorted({action for _, target in every for action in target})
        pairs = [Pair(*pair) for pair in train if pair[0] not in held]
        return Data(
            Vocabulary(words),
            Vocabulary(actions),
            pairs,
            [Item(source, (target,)) for source, target in dev],
            [Item(source, (target,)) for source, target in test],
            fingerprint(pairs),
        )

    @classmethod
    def test_option(cls, path: Path) -> dict[str, Any]:
        lines = (" ".join(line.split()) for line in parallel.read_text(path).splitlines())
        return {"test_commands": tuple(sorted({line for line in lines if line}))}

    def listed(self, path: Path) -> tuple[list[Item], list[str]]:
        meaning = dict(scan.commands())
        lines = [tuple(line.split()) for line in self.test_option(path)["test_commands"]]
        if unknown := [line for line in lines if line not in meaning]:
            raise InputError(f"--test: {' '.join(unknown[0])!r} is no command of SCAN")
        return [Item(line, (meaning[line],)) for line in lines], []

    def _simple(self, every: Sequence[scan.Pair]) -> tuple[list[scan.Pair], list[scan.Pair]]:
        if self.config.test_commands is None:
            kept = {source for source, _ in every if place(("test", *source)) < TEST_SHARE}
        else:
            kept = {tuple(line.split()) for line in self.config.test_commands}
            if unknown := kept - {source for source, _ in every}:
                raise InputError(f"--test: {' '.join(min(unknown))!r} is no command of SCAN")
        train = [pair for pair in every if pair[0] not in kept]
        return train, [pair for pair in every if pair[0] in kept]


@dataclass(frozen=True)
class ReverseConfig:
    """numbers: how many different ones; pairs: to train on, of at most ``longest`` numbers;
    test_longest: length of the longest in the test.
    """

    numbers: int = 51
    pairs: int = 50_000
    longest: int = 25
    test_longest: int = 30

    def __post_init__(self) -> None:
        for name in ("numbers", "pairs", "longest", "test_longest"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


class Reverse(Task):
    """Sequences of numbers, turned around: what one state cannot hold, attention looks up."""

    name, kind = "reverse", ReverseConfig
    units, rates = ("sequences", "numbers"), ("sequences wrong", "numbers wrong")
    model = ModelConfig(hidden=128, embedding=64, score="concat", attn_dim=128, dropout=0.05)
    training = TrainingConfig(epochs=4, batch_size=128, lr=4e-3)
    judged: ClassVar[int] = 1_000  # sequences for development, and for the test

    def load(self) -> Data:
        config = self.config
        generator = random.Random(0)
        symbols = [str(number) for number in range(config.numbers)]

        def draw(count: int, longest: int) -> list[Pair]:
            found = []
            for _ in range(count):
                source = tuple(generator.choices(symbols, k=generator.randint(1, longest)))
                found.append(Pair(source, source[::-1]))
            return found

        train = draw(config.pairs, config.longest)
        dev, test = draw(self.judged, config.longest), draw(self.judged, config.test_longest)
        vocabulary = Vocabulary(symbols)
        return Data(vocabulary, vocabulary, train, grouped(dev), grouped(test), fingerprint(train))


TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        G2P,
        Scan,
        Reverse,
        Pairs,
        Translate,
        Chat,
    )
}


def make_task(values: dict[str, Any]) -> Task:
    """The task of `Task.to_json`; raises KeyError, TypeError or ValueError if it is none."""
    options = dict(values)
    name = options.pop("name")
    if name not in TASKS:
        raise ValueError(f"its task is {name!r}, known are {', '.join(TASKS)}")
    kind = TASKS[name]
    lists = {key: tuple(value) for key, value in options.items() if isinstance(value, list)}
    return kind(kind.kind(**options | lists))
