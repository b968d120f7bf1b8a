"""The task reverse: sequences of numbers, reversed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from fused_attn.seq2seq.config import ModelConfig, TrainingConfig
from fused_attn.seq2seq.data.pairs import Data, Pair, fingerprint, grouped
from fused_attn.seq2seq.tasks.base import Task
from fused_attn.seq2seq.vocabulary import Vocabulary


@dataclass(frozen=True)
class ReverseConfig:
    """Options of the task reverse.

    numbers: size of the vocabulary.
    pairs: number of training pairs.
    longest: length of the longest sequence in the training and development sets.
    test_longest: length of the longest sequence in the test set.
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
    """Sequences of numbers, reversed: a task for attention, as one state cannot hold a sequence."""

    name, kind = "reverse", ReverseConfig
    units, rates = ("sequences", "numbers"), ("sequences wrong", "numbers wrong")
    model = ModelConfig(hidden=128, embedding=64, score="concat", attn_dim=128, dropout=0.05)
    training = TrainingConfig(epochs=4, batch_size=128, lr=4e-3)
    judged: ClassVar[int] = 1_000  # sequences in each of the development and test sets

    def load(self, *, links: bool = False) -> Data:
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
