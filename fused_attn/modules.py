"""Submodules must be called, so that whatever wraps them sees the call.

Hooks, LoRA and similar adapters, pruning, the old weight_norm, quantisation and sharding all act
when a module is called. Fused code paths read a submodule's weight instead, which is allowed only
if it is an `nn.Linear` that nothing has wrapped. Methods other than `forward`, which run without
the layer's hooks, are marked with `beside_forward`.
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
_PLAIN = (Tensor, nn.Parameter, FakeTensor)  # other subclasses may hold quantised or sharded data
_RECOMPUTES = (BasePruningMethod, WeightNorm, SpectralNorm)
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_Layer = TypeVar("_Layer", bound=nn.Module)


def hooks_of(module: nn.Module) -> list[str]:
    """The kinds of hooks that run when this module is called, besides its class's forward."""
    hooks = [name for name in _HOOKS if getattr(module, name, None)]
    return [*hooks, "forward"] if "forward" in module.__dict__ else hooks


def hook_dicts(module: nn.Module) -> list[Any]:
    """The dicts that hold the hooks of a module, each empty without hooks."""
    return [getattr(module, name) for name in _HOOKS]


def readable_weight(part: nn.Module, at_call: bool = True) -> Tensor | None:
    """The weight of a linear layer that need not be called; None if the layer must be called.

    The layer must be an `nn.Linear` without hooks and with a dense weight. A parametrized weight is
    allowed only ``at_call``, that is if it is read once, where the layer would be called: each read
    runs the parametrization, which may draw random numbers or count its calls.
    """
    kind = type(part)
    if kind is not nn.Linear and not (
        at_call and kind.__bases__ == (nn.Linear,) and parametrize.is_parametrized(part)
    ):
        return None
    if hooks_of(part) or has_global_hooks():
        return None
    weight = part.weight
    return weight if isinstance(weight, Tensor) and type(weight) in _PLAIN else None


def readable_tensors(part: nn.Module, kind: type[nn.Module], names: list[str]) -> list[Tensor]:
    """The parameters ``names`` of a layer that need not be called; [] if it must be called.

    The layer must be exactly a ``kind``, not a subclass, without hooks and with dense parameters.
    """
    if type(part) is not kind or hooks_of(part) or has_global_hooks():
        return []
    tensors: list[Any] = [getattr(part, name, None) for name in names]
    return tensors if all(type(tensor) in _PLAIN for tensor in tensors) else []


def has_global_hooks() -> bool:
    """Whether global module hooks require that submodules are called.

    The hooks of FLOP counters do not: they only observe, and should count the usual code path.
    """
    if not nn_module._has_any_global_hook():
        return False
    hooks = (hook for kind in _GLOBAL_HOOKS for hook in getattr(nn_module, kind).values())
    return not all(isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks)


def read_only(layer: nn.Module) -> str | None:
    """Why the weights of ``layer`` cannot be read and written as plain parameters, or None.

    Computed weights cannot be written, and reading them may give those of the previous step.
    """
    for path, part in layer.named_modules():
        if isinstance(part, nn.LazyLinear):  # it has its own hook, and no weight yet
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
    """Return ``part(states)``; TypeError about ``name`` if its dtype is not the parameters'.

    The dtype is checked only after a failure, because a wrapped part may take more dtypes than its
    parameters have. ``read`` is a (weight, bias) to use in place of the part's own.
    """
    if torch.compiler.is_compiling():  # a graph break inside try makes torch drop the whole graph
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
    """Recompute those parameters of ``layer`` itself that every call of it recomputes.

    Pruning, and the old hook-based weight_norm and spectral_norm, replace a parameter by a tensor
    computed in the last call, whose autograd graph may have been freed.
    """
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, _RECOMPUTES):
            hook(layer, ())


def beside_forward(
    method: Callable[Concatenate[_Layer, _Arguments], _Result],
) -> Callable[Concatenate[_Layer, _Arguments], _Result]:
    """Decorator for a method other than `forward` that reads parameters.

    It calls `refresh` first, and explains the error if the parameters are sharded.
    """

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
                f"{name} found sharded parameters: call it within the forward of a module that was "
                "passed to fully_shard, or register it before the first call with "
                f"torch.distributed.fsdp.register_fsdp_forward_method(layer, {name!r})"
            ) from error

    return run


def _is_sharded(layer: nn.Module) -> bool:
    tensors = sys.modules.get("torch.distributed.tensor")  # imported if anything is sharded
    return tensors is not None and any(
        isinstance(parameter, tensors.DTensor) for parameter in layer.parameters()
    )


def is_proxy(value: Any) -> bool:
    """Whether value is a Proxy of `torch.fx.symbolic_trace`, which traces without tensors."""
    return isinstance(value, Proxy)


def as_node(layer: nn.Module, query: Any, *args: Any, **kwargs: Any) -> Any:
    """Record the call of ``layer`` as one node in the graph of `torch.fx.symbolic_trace`."""
    tracer = query.tracer
    path = getattr(tracer, "path_of_module", lambda _: "")(layer)
    if not path:
        raise TypeError(
            f"query is a Proxy: torch.fx.symbolic_trace cannot trace into {type(layer).__name__}. "
            "Trace a module that contains it, which makes it one node, or use torch.export.export"
        )
    return tracer.create_proxy("call_module", path, (query, *args), kwargs)
