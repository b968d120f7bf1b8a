"""What a stored state of training must be to be loaded: torch's optimizers do not check theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fused_attn.seq2seq.checkpoints.values import check_types


def check_position(position: Any) -> None:
    """Raise TypeError or ValueError unless the values of a `Position` are possible."""
    check_types(position)
    for name in ("step", "epoch", "batch", "tokens", "sampling_from", "waited", "plateaus"):
        value = getattr(position, name)
        if value is not None and value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    if position.batch and not position.tokens:
        raise ValueError("tokens must be positive within an epoch, got 0")


def check_moments(name: str, moments: Mapping[str, Tensor], parameter: Tensor) -> None:
    """Raise ValueError unless the state of Adam fits a parameter.

    moments: "exp_avg" and "exp_avg_sq" like the parameter, and "step", float32 ().
    """
    for moment, tensor in moments.items():
        shape, dtype = parameter.shape, parameter.dtype
        if moment == "step":
            shape, dtype = torch.Size(), torch.float32
        if tensor.shape != shape:
            found, expected = tuple(tensor.shape), tuple(shape)
            raise ValueError(f"{moment}.{name} has shape {found}, expected {expected}")
        if tensor.dtype != dtype:
            raise ValueError(f"{moment}.{name} is {tensor.dtype}, expected {dtype}")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{moment}.{name} has values that are not finite")
        if moment != "exp_avg" and bool((tensor < 0).any()):
            raise ValueError(f"{moment}.{name} has negative values")


def check_generator(name: str, states: Tensor) -> None:
    """Raise ValueError unless a tensor is the states of generators, uint8 (processes, N)."""
    size = torch.get_rng_state().numel()
    if states.dtype != torch.uint8 or states.ndim != 2 or not len(states):
        raise ValueError(f"{name} must be uint8 (processes, bytes)")
    if states.shape[1] < size:
        raise ValueError(f"{name} has {states.shape[1]} bytes per process, expected {size}")


def number(tensors: Mapping[str, Tensor], name: str) -> float:
    """Return the value of a tensor of one element; raises KeyError or ValueError."""
    tensor = tensors[name]
    if tensor.numel() != 1 or not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} must be one finite number")
    return tensor.item()
