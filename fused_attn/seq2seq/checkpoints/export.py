"""Export a model: write a checkpoint without the training state."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.checkpoints.compress import STORED_TYPES, narrowed, widened
from fused_attn.seq2seq.checkpoints.load import check_symbols
from fused_attn.seq2seq.checkpoints.recipe import START_FROM, TEACHER
from fused_attn.seq2seq.errors import InputError, OptionError
from fused_attn.seq2seq.outputs import named
from fused_attn.seq2seq.tasks.registry import make_task

_OF_TRAINING = ("position", "format_version", START_FROM, TEACHER)


def save_model(
    directory: Path, meta: Mapping[str, Any], parameters: Mapping[str, Tensor], store: str
) -> None:
    """Write a model to ``directory`` as a new checkpoint.

    meta: metadata as in a checkpoint; entries that only training needs are dropped.
    store: dtype of the stored parameters, "float32", "float16" or "int8".

    Raises `InputError` if the directory exists, ``store`` is not one of these or cannot hold the
    parameters, or they are not finite, or a symbol cannot be stored; OSError if the checkpoint
    cannot be written.
    """
    if store not in STORED_TYPES:
        raise OptionError("store", f"must be one of {', '.join(STORED_TYPES)}, got {store!r}")
    if os.path.lexists(directory):
        raise InputError(f"{directory} already exists; name a new directory")
    try:
        for name in ("source", "target"):
            check_symbols(name, meta[name])
    except ValueError as error:
        raise InputError(f"cannot save the model: {error}") from None
    try:
        files.check_parameters(parameters)
    except ValueError as error:
        raise InputError(f"cannot save the model: its parameter {error}") from None
    stored = narrowed(parameters, store)
    try:
        files.check_parameters(widened(stored))
    except ValueError as error:
        raise OptionError("store", f"cannot be {store}: the parameter {error} then") from None
    kept = {key: value for key, value in meta.items() if key not in _OF_TRAINING}
    task = make_task(kept["task"])
    kept["task"] = task.to_json() | dict.fromkeys(task.only_trained_on)
    try:
        files.save(directory, kept, stored, None)
    except OSError as error:
        raise named(error, directory) from None
