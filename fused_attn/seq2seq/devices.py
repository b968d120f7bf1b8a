"""The device that a model runs on."""

from __future__ import annotations

import os

import torch

from fused_attn.seq2seq.errors import InputError


def choose_device(name: str) -> torch.device:
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
        raise InputError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise InputError(f"--device {name} is not there: torch finds {there} CUDA devices")
    return device


def own_device(name: str) -> str:
    """The name of this process's device, where ``torchrun`` started several."""
    rank = os.environ.get("LOCAL_RANK")
    shared = name in ("auto", "cuda") and torch.cuda.is_available()
    return f"cuda:{rank}" if rank is not None and shared else name
