"""The recipe of a run, as stored in its checkpoints."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.checkpoints.values import check_types, configured
from fused_attn.seq2seq.config import ModelConfig, TrainingConfig
from fused_attn.seq2seq.data.tokenizers import check_subwords
from fused_attn.seq2seq.search.constraints import LengthBound
from fused_attn.seq2seq.tasks.base import Task
from fused_attn.seq2seq.tasks.registry import make_task
from fused_attn.seq2seq.tasks.text import TextTask

# A search may go on for as many symbols as the longest training target has, so a damaged checkpoint
# must not name any number.
LONGEST_TARGET = 1_000_000

# Keys in the metadata of a run: the model it started from, and the teachers it learns from.
START_FROM, TEACHER = "start_from", "teacher"


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the results of a run."""

    model: ModelConfig
    training: TrainingConfig
    task: Task

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as JSON values."""
        return {
            "model": asdict(self.model),
            "training": asdict(self.training),
            "task": self.task.to_json(),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Recipe:
        """Return the recipe in the metadata of a checkpoint.

        Raises one of `files.UNUSABLE` if the metadata is not valid.
        """
        return cls(
            configured(ModelConfig, values["model"]),
            # Missing if the model was trained in a loop of the user's own.
            configured(TrainingConfig, values.get("training", {})),
            stored_task(values),
        )


def stored_task(meta: dict[str, Any]) -> Task:
    """Return the task in the metadata of a checkpoint.

    Raises one of `files.UNUSABLE` if the metadata is not valid.
    """
    task = make_task(meta["task"])
    check_types(task.config)
    if isinstance(task, TextTask):
        if task.config.subwords is not None:
            check_subwords(task.config.subwords)
        elif "subwords" in task.tokens:
            raise ValueError("its subword model is missing")
    return task


def stored_bound(meta: dict[str, Any]) -> LengthBound:
    """Return the bound on target lengths in the metadata of a checkpoint.

    Raises one of `files.UNUSABLE` if the metadata is not valid.
    """
    bound = configured(LengthBound, meta.get("target_bound", {}))
    if not (bound.ratio >= 0 and 0 <= bound.longest <= LONGEST_TARGET):
        raise ValueError(f"target_bound is out of range: {bound.ratio}, {bound.longest}")
    return bound


def load_recipe(directory: Path, meta: dict[str, Any]) -> Recipe:
    """Return the recipe of a checkpoint; raises `InputError` if it is damaged.

    directory: for error messages. meta: its metadata.
    """
    try:
        return Recipe.from_json(meta)
    except files.UNUSABLE as error:
        raise files.damaged(directory, error) from None
