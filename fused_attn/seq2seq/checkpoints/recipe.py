"""Everything that decides the numbers of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.config import ModelConfig, TrainingConfig
from fused_attn.seq2seq.tasks.base import Task
from fused_attn.seq2seq.tasks.registry import make_task

# In the metadata of a run: the model that it began with, and the models that it learns from.
START_FROM, TEACHER = "start_from", "teacher"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the numbers of a run."""

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
        """Return the recipe of a checkpoint; KeyError, TypeError or ValueError if it is none."""
        return cls(
            ModelConfig(**values["model"]),
            TrainingConfig(**values["training"]),
            make_task(values["task"]),
        )


def load_recipe(directory: Path, meta: dict[str, Any]) -> Recipe:
    """Return the recipe of a checkpoint with this metadata; raises `InputError`."""
    try:
        return Recipe.from_json(meta)
    except (KeyError, TypeError, ValueError) as error:
        raise files.damaged(directory, error) from None
