"""Choosing a device, and copying tensors to it."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from fused_attn.seq2seq.errors import OptionError

# How often, in steps, a search checks which sentences are done. On a GPU the check makes the host
# wait for the device.
LOOK_EVERY = {"cpu": 1, "cuda": 4}


def choose_device(name: str | torch.device) -> torch.device:
    """Return the device with this name: "cpu", "cuda", "cuda:1" ...; "auto" prefers a GPU.

    Raises `InputError` if the name is not one of these or the device is not available.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise OptionError("device", f"must be auto, cpu, cuda or cuda:N, got {str(name)!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        why = f"torch finds {torch.cuda.device_count()} CUDA devices"
        if torch.version.cuda is None:
            why = "this build of torch does not support CUDA"
        raise OptionError("device", f"{name} is not available: {why}")
    return device


def own_device(name: str) -> str:
    """Return the device name for this process: under ``torchrun`` each rank uses its own GPU."""
    rank = os.environ.get("LOCAL_RANK")
    shared = name in ("auto", "cuda") and torch.cuda.is_available()
    return f"cuda:{rank}" if rank is not None and shared else name


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device. CPU tensors are pinned and copied to a GPU asynchronously."""
    if device.type != "cuda" or not tensor.is_cpu:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
