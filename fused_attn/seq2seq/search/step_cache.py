"""Captured steps that are at hand: for each model a few, kept as long as the model is."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fused_attn import modules
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.search.captured import CapturedStepper, Room
from fused_attn.seq2seq.search.graphs import RECORDERS
from fused_attn.seq2seq.search.stepping import Decoders

# For each model; the one that was used last always stays.
MOST_STEPS = 8
MOST_BYTES = 1 << 30

_LOG = logging.getLogger(__name__)

Key = tuple[Any, ...]


def not_captured_reasons(models: Sequence[Seq2Seq]) -> list[str]:
    """Why a step of these models has to go through Python now, in sentences; empty if not.

    A replay does what the device did when it was captured: nothing that looks on or draws anew.
    """
    device = next(models[0].parameters()).device
    reasons = []
    if device.type not in RECORDERS:
        reasons.append(f"there are no graphs on the device type {device.type}")
        return reasons
    if torch.is_grad_enabled():
        reasons.append("gradients are on")
    if torch.is_autocast_enabled(device.type):
        reasons.append("autocast is on")
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        reasons.append("a compiler or a dispatch mode looks at every operator")
    if nn_module._has_any_global_hook():
        reasons.append("there are hooks of every module")
    for model in models:
        if any(module.training for module in model.modules()):
            reasons.append("a model is in training mode")
        if reason := modules.read_only(model):
            reasons.append(reason)
        if any(tensor.device != device for tensor in model.parameters()):
            reasons.append("the models are not on one device")
    return reasons


class StepCache:
    """The captured steps of a model, or of the ensembles that it is the first of."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._recorder = RECORDERS[device.type](device)
        self._steps: OrderedDict[Key, CapturedStepper] = OrderedDict()
        self._failed: str | None = None  # why capturing does not work

    def __len__(self) -> int:
        return len(self._steps)

    def take(self, models: Sequence[Seq2Seq], room: Room) -> CapturedStepper | None:
        """Return a captured step if there is one, which is the caller's alone until `give_back`.

        Steps whose parameters are elsewhere now are dropped.
        """
        key = _key(models, room)
        step = self._steps.pop(key, None)
        if step is not None and step.serves(models):
            return step
        for other in [k for k in self._steps if k[0] == key[0] and k[1] != key[1]]:
            self._steps.pop(other, None)
        return None

    def capture(
        self, models: Sequence[Seq2Seq], decoders: Decoders, room: Room
    ) -> CapturedStepper | None:
        """Capture a step; None if that does not work, now and for good."""
        if self._failed is not None:
            return None
        try:
            return CapturedStepper(models, decoders, room, self._recorder)
        except RuntimeError as error:
            self._failed = str(error)
            _LOG.debug("steps go through Python, they cannot be captured: %s", error)
            return None

    def give_back(self, models: Sequence[Seq2Seq], step: CapturedStepper) -> None:
        """Keep a step for the next search."""
        self._steps[_key(models, step.room)] = step
        while len(self._steps) > 1 and (
            len(self._steps) > MOST_STEPS
            or sum(each.nbytes for each in list(self._steps.values())) > MOST_BYTES
        ):
            self._steps.popitem(last=False)


_CACHES: WeakKeyDictionary[Seq2Seq, StepCache] = WeakKeyDictionary()


def cache_of(model: Seq2Seq) -> StepCache:
    """The captured steps of a model on a device that has graphs."""
    device = next(model.parameters()).device
    cache = _CACHES.get(model)
    if cache is None or cache.device != device:
        cache = _CACHES[model] = StepCache(device)
    return cache


def _key(models: Sequence[Seq2Seq], room: Room) -> Key:
    """Everything that a graph has taken over from its capture: models, addresses, settings."""
    addresses = tuple(
        (tensor.data_ptr(), tensor.dtype, tensor.device)
        for model in models
        for tensor in (*model.parameters(), *model.buffers())
    )
    layers = tuple(
        None if model.decoder.attention is None else model.decoder.attention.extra_repr()
        for model in models
    )
    settings = (
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.rnn.fp32_precision,  # type: ignore[attr-defined]
        torch.backends.cudnn.enabled,
        torch.are_deterministic_algorithms_enabled(),
        os.environ.get("FUSED_ATTN_BACKEND"),
    )
    return tuple(map(id, models)), addresses, layers, settings, room
