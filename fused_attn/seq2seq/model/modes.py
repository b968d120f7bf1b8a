"""Modes that models are made or run in for a while: without random draws, or without dropout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch.overrides import TorchFunctionMode

from fused_attn.seq2seq.model.seq2seq import Seq2Seq


class WithoutDraws(TorchFunctionMode):
    """Leaves the parameters of new models uninitialised, in this thread: they are loaded anyway."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else named["tensor"]
        return func(*args, **named)


@contextmanager
def evaluating(models: Sequence[Seq2Seq]) -> Iterator[None]:
    """Put the models into evaluation mode for a while, in case they are being trained.

    Afterwards each module has its own mode again: a frozen encoder may have been in another one.
    """
    training = [module for model in models for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
