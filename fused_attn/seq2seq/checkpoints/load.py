"""Load the model and the vocabularies of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fused_attn import backends, choices
from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.config import ModelConfig
from fused_attn.seq2seq.devices import choose_device
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.vocabulary import Vocabulary


def require_backend(backend: str, score: str, device: torch.device) -> None:
    """Raise `InputError` unless the backend can run a model with this score on the device."""
    try:
        backends.check_request(backend)
        if score in choices.SCORES:  # other scores are composed in torch, or need no backend
            backends.select(device.type, torch.float32, score, backend)
    except ValueError as error:
        raise InputError(" ".join(str(error).split())) from None


def load_vocabularies(directory: Path, meta: dict[str, Any]) -> tuple[Vocabulary, Vocabulary]:
    """Return the source and target vocabularies of a checkpoint.

    directory: for error messages. meta: its metadata. Raises `InputError` if it is damaged.
    """
    try:
        return Vocabulary(meta["source"]), Vocabulary(meta["target"])
    except (KeyError, TypeError, ValueError) as error:
        raise files.damaged(directory, error) from None


def load_model(
    directory: Path,
    meta: dict[str, Any],
    *,
    backend: str = "auto",
    device: torch.device | str = "auto",
) -> tuple[Seq2Seq, Vocabulary, Vocabulary]:
    """Return the model of a checkpoint, and its source and target vocabularies.

    meta: the metadata of the checkpoint. device: where to put the model, see `choose_device`.

    Raises `InputError` if the checkpoint is damaged, the device is not available or the backend
    cannot run the model.
    """
    device = choose_device(device)
    parameters = files.load_tensors(directory, files.MODEL)
    try:
        config = ModelConfig(**meta["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise files.damaged(directory, error) from None
    source, target = load_vocabularies(directory, meta)
    require_backend(backend, config.score, device)
    model = Seq2Seq(config, len(source), len(target), backend=backend)
    try:
        model.load_state_dict(parameters)
    except RuntimeError as error:  # names or shapes of parameters do not match
        raise files.damaged(directory, error) from None
    return model.to(device), source, target
