"""The base class of tasks: data, options, and the conversion between texts and symbols.

This module does not import torch: the command line reads the options from the configurations.
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
from fused_attn.seq2seq.data.tokenizers import Words
from fused_attn.seq2seq.errors import OptionError
from fused_attn.seq2seq.vocabulary import Vocabulary


class Task(ABC):
    """A task with its configuration: plain values that are stored in every checkpoint."""

    name: ClassVar[str]
    kind: ClassVar[type]  # class of the configuration
    units: ClassVar[tuple[str, str]]  # plural names of the sources and of the target symbols
    rates: ClassVar[tuple[str, str]]  # names of the sequence and the symbol error rate
    model: ClassVar[ModelConfig] = ModelConfig()
    training: ClassVar[TrainingConfig] = TrainingConfig()
    # Whether checkpoints are chosen by the perplexity of the development set: for tasks where many
    # different targets are correct.
    by_perplexity: ClassVar[bool] = False
    # Fields of the configuration that only training uses; an exported model drops them.
    only_trained_on: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def load(self, *, links: bool = False) -> Data:
        """Read or generate the data; raises `InputError` if that fails.

        links: whether to read the alignment links of the training pairs, if they have any.

        What is learned from the data, a subword model, is stored in the configuration.
        """

    def with_vocabularies(self, data: Data, source: Vocabulary, target: Vocabulary) -> Data:
        """Return ``data`` from `load` with the vocabularies of an existing model."""
        return replace(data, source=source, target=target)

    @classmethod
    def test_option(cls, path: Path) -> dict[str, Any]:
        """Return the fields of the configuration that ``--test path`` sets; raises `InputError`."""
        raise OptionError("test", f"is not an option of the task {cls.name}")

    @property
    def has_data(self) -> bool:
        """Whether `load` can find the data: pairs that were given in Python are not stored."""
        return True

    def read(self, text: str) -> Symbols:
        """Return the source symbols of a text."""
        return Words().split(text)

    def read_target(self, text: str) -> Symbols:
        """Return the target symbols of a text."""
        return Words().split(text)

    def write(self, target: Iterable[str]) -> str:
        """Return the text of a target."""
        return " ".join(target)

    def show(self, source: Iterable[str]) -> str:
        """Return the text of a source."""
        return " ".join(source)

    def listed(self, path: Path) -> tuple[list[Item], list[str]]:
        """Return the test items in a file given to `evaluate`, and notes; raises `InputError`."""
        raise OptionError("test", f": the task {self.name} has its own test set")

    def quality(self, found: Sequence[Symbols], items: Sequence[Item]) -> dict[str, float]:
        """Return quality metrics of predicted targets by name, in 0..1.

        They rank before the error rates when checkpoints are compared.
        """
        return {}

    def updated(self, values: dict[str, Any]) -> Self:
        """Return a copy of the task with the configuration in ``values``, as from `to_json`."""
        task = copy.copy(self)
        task.config = self.config_of(values)
        return task

    @classmethod
    def config_of(cls, values: dict[str, Any]) -> Any:
        """Return the configuration in ``values``, as from `to_json`.

        Fields that a checkpoint of an earlier version lacks have the values in the mapping
        ``if_absent`` of the configuration, if it has one, else their defaults.

        Raises TypeError or ValueError if the fields or their values are not valid.
        """
        values = {**getattr(cls.kind, "if_absent", {}), **values}
        lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        return cls.kind(**{key: v for key, v in (values | lists).items() if key != "name"})

    def to_json(self) -> dict[str, Any]:
        """Return the name and the configuration as JSON values."""
        return {"name": self.name, **asdict(self.config)}
