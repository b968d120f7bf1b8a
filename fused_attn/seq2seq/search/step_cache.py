"""A cache of captured steps: a few for each model, kept as long as the model lives."""

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

# Limits for each model. The step used last is always kept.
MOST_STEPS = 8
MOST_BYTES = 1 << 30

_LOG = logging.getLogger(__name__)

Key = tuple[Any, ...]


def not_captured_reasons(models: Sequence[Seq2Seq]) -> list[str]:
    """Return why a step of these models cannot be captured now, as phrases; empty if it can.

    A replay only repeats the device work of the capture. It runs no hooks, computes no gradients
    and draws no new random numbers.
    """
    device = next(models[0].parameters()).device
    reasons = []
    if device.type not in RECORDERS:
        reasons.append(f"the device type {device.type} does not support graphs")
        return reasons
    if torch.is_grad_enabled():
        reasons.append("gradients are enabled")
    if torch.is_autocast_enabled(device.type):
        reasons.append("autocast is enabled")
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        reasons.append("a compiler or a dispatch mode intercepts operators")
    if nn_module._has_any_global_hook():
        reasons.append("global module hooks are registered")
    for model in models:
        if any(module.training for module in model.modules()):
            reasons.append("a model is in training mode")
        if reason := modules.read_only(model):
            reasons.append(reason)
        if any(tensor.device != device for tensor in model.parameters()):
            reasons.append("the models are not on one device")
    return reasons


class StepCache:
    """The captured steps of a model, and of ensembles whose first model it is."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._recorder = RECORDERS[device.type](device)
        self._steps: OrderedDict[Key, CapturedStepper] = OrderedDict()
        self._failed: str | None = None  # why capturing does not work

    def __len__(self) -> int:
        return len(self._steps)

    def take(self, models: Sequence[Seq2Seq], room: Room) -> CapturedStepper | None:
        """Remove a captured step from the cache and return it; None if there is no such step.

        The caller owns the step until `give_back`. Steps of these models whose parameters have
        moved to other memory are dropped.
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
        """Capture a step. Returns None if that fails, and from then on without another try."""
        if self._failed is not None:
            return None
        try:
            return CapturedStepper(models, decoders, room, self._recorder)
        except RuntimeError as error:
            self._failed = str(error)
            _LOG.debug("steps cannot be captured, and run eagerly: %s", error)
            return None

    def give_back(self, models: Sequence[Seq2Seq], step: CapturedStepper) -> None:
        """Return a step to the cache for the next search, which may evict older ones."""
        self._steps[_key(models, step.room)] = step
        while len(self._steps) > 1 and (
            len(self._steps) > MOST_STEPS
            or sum(each.nbytes for each in list(self._steps.values())) > MOST_BYTES
        ):
            self._steps.popitem(last=False)


_CACHES: WeakKeyDictionary[Seq2Seq, StepCache] = WeakKeyDictionary()


def cache_of(model: Seq2Seq) -> StepCache:
    """Return the cache of a model, which must be on a device that supports graphs."""
    device = next(model.parameters()).device
    cache = _CACHES.get(model)
    if cache is None or cache.device != device:
        cache = _CACHES[model] = StepCache(device)
    return cache


def _key(models: Sequence[Seq2Seq], room: Room) -> Key:
    """Everything a graph fixes at its capture: models, parameter addresses, settings, sizes."""
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
