"""Export a model: write a checkpoint without the training state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.checkpoints.compress import STORED_TYPES, narrowed
from fused_attn.seq2seq.checkpoints.recipe import START_FROM, TEACHER
from fused_attn.seq2seq.errors import InputError, OptionError
from fused_attn.seq2seq.tasks.registry import TASKS

_OF_TRAINING = ("position", "format_version", START_FROM, TEACHER)


def save_model(
    directory: Path, meta: Mapping[str, Any], parameters: Mapping[str, Tensor], store: str
) -> None:
    """Write a model to ``directory`` as a new checkpoint.

    meta: metadata as in a checkpoint; entries that only training needs are dropped.
    store: dtype of the stored parameters, "float32", "float16" or "int8".

    Raises `InputError` if the directory exists or ``store`` is not one of these, OSError if the
    checkpoint cannot be written.
    """
    if store not in STORED_TYPES:
        raise OptionError("store", f"must be one of {', '.join(STORED_TYPES)}, got {store!r}")
    if directory.exists():
        raise InputError(f"{directory} already exists; name a new directory")
    kept = {key: value for key, value in meta.items() if key not in _OF_TRAINING}
    kept["task"] = kept["task"] | dict.fromkeys(TASKS[kept["task"]["name"]].only_trained_on)
    files.save(directory, kept, narrowed(parameters, store), None)
