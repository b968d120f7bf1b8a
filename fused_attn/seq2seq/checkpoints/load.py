"""Load the model and the vocabularies of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_attn import backends, choices
from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.checkpoints.values import configured
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
        return _vocabulary(meta, "source"), _vocabulary(meta, "target")
    except files.UNUSABLE as error:
        raise files.damaged(directory, error) from None


def _vocabulary(meta: dict[str, Any], name: str) -> Vocabulary:
    symbols = meta[name]
    if not isinstance(symbols, list):
        raise TypeError(f"the {name} vocabulary must be a list, got {type(symbols).__name__}")
    check_symbols(name, symbols)
    return Vocabulary(symbols)


def check_symbols(name: str, symbols: Sequence[Any]) -> None:
    """Raise ValueError unless symbols can be those of a checkpoint.

    name: "source" or "target", for the message.
    """
    for number, symbol in enumerate(symbols):
        if not isinstance(symbol, str) or not symbol:
            raise ValueError(f"the {name} vocabulary: entry {number} must be a text")
    try:
        "".join(symbols).encode()
    except UnicodeEncodeError:
        raise ValueError(f"the {name} vocabulary has a text that UTF-8 cannot encode") from None


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
    parameters = files.load_tensors(directory, files.MODEL, meta)
    config = load_model_config(directory, meta)
    source, target = load_vocabularies(directory, meta)
    check_shapes(directory, config, len(source), len(target), parameters)
    require_backend(backend, config.score, device)
    model = Seq2Seq(config, len(source), len(target), backend=backend)
    model.load_state_dict(parameters)
    return model.to(device), source, target


def load_model_config(directory: Path, meta: dict[str, Any]) -> ModelConfig:
    """Return the shape of the model of a checkpoint; raises `InputError` if it is damaged."""
    try:
        return configured(ModelConfig, meta["model"])
    except files.UNUSABLE as error:
        raise files.damaged(directory, error) from None


def check_shapes(
    directory: Path,
    config: ModelConfig,
    source_size: int,
    target_size: int,
    parameters: Mapping[str, Tensor],
) -> None:
    """Raise `InputError` unless the parameters have the names and shapes of the model.

    Nothing of the size of the model is allocated: ``config`` may be of a damaged checkpoint, and
    may describe a model of any size.
    """
    try:
        # A layer has four parameters at least. This bounds the modules that are made below.
        if 4 * (config.layers + config.encoder_depth) > len(parameters):
            raise ValueError(f"its file has too few parameters for {config.layers} layers")
        with torch.device("meta"):
            expected = Seq2Seq(config, source_size, target_size).state_dict()
        for name, tensor in expected.items():
            if name not in parameters:
                raise ValueError(f"the parameter {name} is missing")
            if parameters[name].shape != tensor.shape:
                raise ValueError(
                    f"the parameter {name} has shape {tuple(parameters[name].shape)}, "
                    f"expected {tuple(tensor.shape)}"
                )
        if unknown := sorted(parameters.keys() - expected.keys()):
            raise ValueError(f"unknown parameter {unknown[0]!r}")
    except files.UNUSABLE as error:
        raise files.damaged(directory, error) from None
