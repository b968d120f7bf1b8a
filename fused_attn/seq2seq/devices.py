"""The device that a model runs on."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from fused_attn.seq2seq.errors import OptionError

# A search looks every so many steps which sentences are done. On a GPU the host waits for that.
LOOK_EVERY = {"cpu": 1, "cuda": 4}


def choose_device(name: str | torch.device) -> torch.device:
    """Return the device "cpu", "cuda", "cuda:1" ..., or for "auto" a GPU if there is one.

    Raises `InputError` if it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise OptionError("device", f"must be auto, cpu, cuda or cuda:N, got {str(name)!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        there = torch.cuda.device_count()
        why = f"torch finds {there} CUDA devices"
        if torch.version.cuda is None:
            why = "this torch is built without CUDA"
        raise OptionError("device", f"{name} is not there: {why}")
    return device


def own_device(name: str) -> str:
    """The name of this process's device, where ``torchrun`` started several."""
    rank = os.environ.get("LOCAL_RANK")
    shared = name in ("auto", "cuda") and torch.cuda.is_available()
    return f"cuda:{rank}" if rank is not None and shared else name


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, from the CPU without waiting for what the device does."""
    if device.type != "cuda" or not tensor.is_cpu:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
