"""Parts as modules: a part of a layer is called, so that whatever wraps it sees the call.

Hooks, LoRA and its kin, pruning, the old weight_norm, quantisation and sharding all act when a
module is called. Only a `nn.Linear` that nothing has wrapped may be read instead, where a fused
form needs its weight; and a method beside `forward`, which no hook of the layer precedes, says so
by `beside_forward`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Proxy
from torch.nn.functional import linear
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils.module_tracker import ModuleTracker

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{kind}" for kind in _HOOKS)
_PLAIN = (Tensor, nn.Parameter, FakeTensor)  # no subclass else: its weight may be in another form
_RECOMPUTES = (BasePruningMethod, WeightNorm, SpectralNorm)
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_Layer = TypeVar("_Layer", bound=nn.Module)


def hooks_of(module: nn.Module) -> list[str]:
    """What is done when this module is called beside its class's forward: kinds of hooks."""
    hooks = [name for name in _HOOKS if getattr(module, name, None)]
    return [*hooks, "forward"] if "forward" in module.__dict__ else hooks


def readable_weight(part: nn.Module, at_call: bool = True) -> Tensor | None:
    """The weight of a linear layer whose forward is known; None for one that must be called.

    Known is that of a `nn.Linear` without hooks and with a dense weight, which a parametrization
    may have made if it is read ``at_call``, once where the layer would be called: at another time
    it may draw or count anew.
    """
    kind = type(part)
    if kind is not nn.Linear and not (
        at_call and kind.__bases__ == (nn.Linear,) and parametrize.is_parametrized(part)
    ):
        return None
    if hooks_of(part) or _has_global_hooks():
        return None
    weight = part.weight
    return weight if isinstance(weight, Tensor) and type(weight) in _PLAIN else None


def _has_global_hooks() -> bool:
    """Whether hooks of every module ask for a call. Those that count FLOPs only look on, and are
    to count what runs without them.
    """
    if not nn_module._has_any_global_hook():
        return False
    hooks = (hook for kind in _GLOBAL_HOOKS for hook in getattr(nn_module, kind).values())
    return not all(isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks)


def read_only(layer: nn.Module) -> str | None:
    """Why the parameters of ``layer`` are not simply its weights; None if they are.

    Weights that are computed cannot be written, and may be of the step before when they are read.
    """
    for path, part in layer.named_modules():
        if isinstance(part, nn.LazyLinear):  # it has a hook of its own, and no weight yet
            continue
        name = path or "the layer"
        if hooks := hooks_of(part):
            return f"{name} has hooks ({', '.join(hooks)})"
        if parametrize.is_parametrized(part):
            return f"{name} is parametrized"
        for parameter in part.parameters(recurse=False):
            if type(parameter) not in _PLAIN:
                return f"{name} holds a {type(parameter).__name__}"
    return None


def project(
    part: nn.Module, states: Tensor, name: str, read: tuple[Tensor, Tensor | None] | None = None
) -> Tensor:
    """``part(states)``; a dtype that its parameters do not have is a TypeError about ``name``.

    Told afterwards: a part that someone has wrapped may well take more dtypes than it has. ``read``
    are weight and bias to use in place of the part's own.
    """
    if torch.compiler.is_compiling():  # a graph that breaks within a try is given up as a whole
        return part(states) if read is None else linear(states, *read)
    try:
        return part(states) if read is None else linear(states, *read)
    except RuntimeError as error:
        dtypes = [p.dtype for p in part.parameters() if p.is_floating_point()]
        if not dtypes or states.dtype in dtypes:
            raise
        wanted, got = (str(kind).removeprefix("torch.") for kind in (dtypes[0], states.dtype))
        raise TypeError(
            f"{name} must have the dtype of the layer's parameters, {wanted}, got {got}"
        ) from error


def refresh(layer: nn.Module) -> None:
    """Compute again the parameters of ``layer`` itself that are computed when it is called.

    Pruning, and the weight and spectral norm that are older than parametrizations, leave a tensor
    of the last call in place of a parameter: it belongs to a graph that may be gone.
    """
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, _RECOMPUTES):
            hook(layer, ())


def beside_forward(
    method: Callable[Concatenate[_Layer, _Arguments], _Result],
) -> Callable[Concatenate[_Layer, _Arguments], _Result]:
    """For a method that reads parameters although nobody calls the module for it."""

    @functools.wraps(method)
    def run(layer: _Layer, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        refresh(layer)
        if torch.compiler.is_compiling():
            return method(layer, *args, **kwargs)
        try:
            return method(layer, *args, **kwargs)
        except RuntimeError as error:
            if not _is_sharded(layer):
                raise
            name = method.__name__
            raise RuntimeError(
                f"{name} found the parameters sharded: call it within the forward of a module "
                "given to fully_shard, or register it before the first call with "
                f"torch.distributed.fsdp.register_fsdp_forward_method(layer, {name!r})"
            ) from error

    return run


def _is_sharded(layer: nn.Module) -> bool:
    tensors = sys.modules.get("torch.distributed.tensor")  # there if anything is sharded
    return tensors is not None and any(
        isinstance(parameter, tensors.DTensor) for parameter in layer.parameters()
    )


def is_proxy(value: Any) -> bool:
    """Whether `torch.fx.symbolic_trace` is at work, which has no tensors."""
    return isinstance(value, Proxy)


def as_node(layer: nn.Module, query: Any, *args: Any, **kwargs: Any) -> Any:
    """One node for the call of ``layer`` in the graph that `torch.fx.symbolic_trace` makes."""
    tracer = query.tracer
    path = getattr(tracer, "path_of_module", lambda _: "")(layer)
    if not path:
        raise TypeError(
            f"query is a Proxy: torch.fx.symbolic_trace cannot look into {type(layer).__name__}. "
            "Trace a module that holds it, which makes it one node, or use torch.export.export"
        )
    return tracer.create_proxy("call_module", path, (query, *args), kwargs)
