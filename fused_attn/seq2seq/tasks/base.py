"""What a task is: its data, its options, and how text becomes symbols and back.

No torch here: the command line reads the options from the configurations.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from fused_attn.seq2seq.config import ModelConfig, TrainingConfig
from fused_attn.seq2seq.data.pairs import Data, Item, Symbols
from fused_attn.seq2seq.errors import OptionError
from fused_attn.seq2seq.vocabulary import Vocabulary


class Task(ABC):
    """A task with its configuration, plain values that go into every checkpoint."""

    name: ClassVar[str]
    kind: ClassVar[type]  # of the configuration
    units: ClassVar[tuple[str, str]]  # what people call a source and a symbol of the target
    rates: ClassVar[tuple[str, str]]  # names of the error rates of whole targets and of symbols
    model: ClassVar[ModelConfig] = ModelConfig()
    training: ClassVar[TrainingConfig] = TrainingConfig()
    # Whether the development set is judged by the perplexity of its targets: where many are right.
    by_perplexity: ClassVar[bool] = False
    # Of the configuration, what a model that is sent somewhere else leaves behind.
    only_trained_on: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def load(self) -> Data:
        """Read or make the pairs; raises `InputError` if they cannot be had.

        What is learned from them, a model of subwords, is in the configuration afterwards.
        """

    def with_vocabularies(self, data: Data, source: Vocabulary, target: Vocabulary) -> Data:
        """What `load` has returned, for a model that has vocabularies already."""
        return replace(data, source=source, target=target)

    @classmethod
    def test_option(cls, path: Path) -> dict[str, Any]:
        """What --test makes of the configuration; raises `InputError`."""
        raise OptionError("test", f"is not an option of the task {cls.name}")

    def read(self, text: str) -> Symbols:
        """The symbols of a line of text."""
        return tuple(text.split())

    def read_target(self, text: str) -> Symbols:
        """The symbols of a target's text."""
        return tuple(text.split())

    def write(self, target: Iterable[str]) -> str:
        """The line for a target."""
        return " ".join(target)

    def show(self, source: Iterable[str]) -> str:
        """The line of a source."""
        return " ".join(source)

    def listed(self, path: Path) -> tuple[list[Item], list[str]]:
        """The items of a file that `evaluate` was given, and notes; raises `InputError`."""
        raise OptionError("test", f": the task {self.name} has its own test")

    def quality(self, found: Sequence[Symbols], items: Sequence[Item]) -> dict[str, float]:
        """Measures of targets that come before the error rates, by name; 0..1."""
        return {}

    def updated(self, values: dict[str, Any]) -> Self:
        """The task with the configuration that `to_json` of one like it returned."""
        task = copy.copy(self)
        task.config = self.config_of(values)
        return task

    @classmethod
    def config_of(cls, values: dict[str, Any]) -> Any:
        """The configuration that `to_json` returned; raises TypeError or ValueError."""
        lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        return cls.kind(**{key: v for key, v in (values | lists).items() if key != "name"})

    def to_json(self) -> dict[str, Any]:
        """Name and configuration as JSON values."""
        return {"name": self.name, **asdict(self.config)}
