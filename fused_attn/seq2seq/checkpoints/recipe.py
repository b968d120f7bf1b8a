"""The recipe of a run, as stored in its checkpoints."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.config import ModelConfig, TrainingConfig
from fused_attn.seq2seq.tasks.base import Task
from fused_attn.seq2seq.tasks.registry import make_task

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

        Raises KeyError, TypeError or ValueError if the metadata is not valid.
        """
        return cls(
            ModelConfig(**values["model"]),
            # Missing if the model was trained in a loop of the user's own.
            TrainingConfig(**values.get("training", {})),
            make_task(values["task"]),
        )


def load_recipe(directory: Path, meta: dict[str, Any]) -> Recipe:
    """Return the recipe of a checkpoint; raises `InputError` if it is damaged.

    directory: for error messages. meta: its metadata.
    """
    try:
        return Recipe.from_json(meta)
    except (KeyError, TypeError, ValueError) as error:
        raise files.damaged(directory, error) from None
