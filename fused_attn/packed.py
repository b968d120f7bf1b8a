"""Describe decoders to the native module, which packs their weights and runs them in one call.

A description is a dict of float32 tensors on the CPU, in torch's own layouts, and of options; see
``PackedModel`` in csrc/packed_spec.cpp. `not_native_reasons` tells what cannot be described.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fused_attn import backends, modules
from fused_attn.attention import LuongAttention
from fused_attn.layer_parts import AlignmentHistory, PredictedPosition

COMPUTE = ("float32", "bfloat16", "int8")
CELLS: dict[type[nn.Module], str] = {nn.LSTM: "lstm", nn.GRU: "gru", nn.RNN: "rnn"}
_BACKENDS = ("auto", "cpu")

# Modules that compute from their parameters what their class says, and nothing else.
_PLAIN = (
    *(nn.Linear, nn.Embedding, nn.LSTM, nn.GRU, nn.RNN, nn.Identity, nn.ModuleList, nn.Dropout),
    *(LuongAttention, AlignmentHistory, PredictedPosition),
)


def native_module() -> Any:
    """Return the native module, None if it is not there."""
    cpu: Any = backends.load("cpu")
    return None if cpu.unavailable_reasons() else cpu.native


def backend_reasons(backend: str) -> list[str]:
    """Return why a layer with this ``backend`` does not run natively; empty if it does."""
    if backend not in _BACKENDS:
        return [f"backend={backend!r} was asked for"]
    if backend == "auto" and (asked := backends.default_request()) not in _BACKENDS:
        return [f"FUSED_ATTN_BACKEND={asked} was asked for"]
    return [] if native_module() is not None else backends.unavailable_reasons("cpu")


def module_reasons(module: nn.Module, own: tuple[type[nn.Module], ...] = ()) -> list[str]:
    """Return why the parameters of a module cannot be read instead of calling its parts.

    own: further classes that compute what the native module computes for them.
    """
    for path, part in module.named_modules():
        name = path or "the module"
        if type(part) not in _PLAIN and type(part) not in own:
            return [f"{name} is a {type(part).__name__}"]
        if hooks := modules.hooks_of(part):
            return [f"{name} has hooks ({', '.join(hooks)})"]
        for key, parameter in part._parameters.items():
            if parameter is None:
                continue
            if type(parameter) is not nn.Parameter and type(parameter) is not Tensor:
                return [f"{name}.{key} is a {type(parameter).__name__}"]
            if parameter.dtype != torch.float32 or not parameter.is_cpu:
                kind = str(parameter.dtype).removeprefix("torch.")
                return [f"{name}.{key} is {kind} on {parameter.device.type}, not float32 on cpu"]
    return []


def attention_reasons(attention: LuongAttention) -> list[str]:
    """Return which options of an attention layer the native decoder lacks."""
    reasons = []
    if attention.normalizer != "softmax":
        reasons.append(f"normalizer={attention.normalizer!r}")
    if attention.layer_norm:
        reasons.append("layer_norm")
    if attention.history is not None and attention.history.channels:
        reasons.append("conv_channels")
    if attention.training and attention.dropout:
        reasons.append("dropout of the attention weights in training mode")
    if attention.score != "concat" and isinstance(attention.scale, nn.Parameter):
        reasons += [] if math.isfinite(float(attention.scale)) else ["a scale that is not finite"]
    return reasons


def attention_spec(attention: LuongAttention) -> dict[str, Any]:
    """Return the description of an attention layer."""
    query = getattr(attention, "query_proj", None)
    memory = getattr(attention, "memory_proj", None)
    output = getattr(attention, "output_proj", None)
    covers = attention.history is not None and attention.history.coverage
    position = attention.position
    scale = 1.0 if attention.score == "concat" else float(attention.scale)
    return {
        "score": attention.score,
        "memory_width": attention.memory_dim,
        "query_weight": _weight(query),
        "query_bias": None if query is None else _detached(query.bias),
        "memory_weight": _weight(memory),
        "v": attention._vector().detach() if attention.score == "concat" else None,
        "scale": scale,
        "coverage_weight": (
            attention.history.coverage_proj.weight.detach()[:, 0]
            if covers and attention.history is not None
            else None
        ),
        "local": str(attention.local),
        "window": float(attention.window),
        "position_weight": None if position is None else _weight(position.proj),
        "position_v": None if position is None else position.v.detach(),
        "combine_weight": _weight(output),
        "combine_bias": None if output is None else _detached(output.bias),
    }


def layer_spec(layer: nn.Module, reverse: bool = False) -> tuple[Tensor | None, ...]:
    """Return weight_ih, weight_hh, bias_ih and bias_hh of a recurrent layer with one layer."""
    end = "_l0_reverse" if reverse else "_l0"
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return tuple(_detached(getattr(layer, name + end, None)) for name in names)


class Snapshot:
    """The parameters of a module at one time, to see whether they changed since.

    Seen: a parameter or a part that was replaced, a hook that was added, a change of a parameter in
    place. Not seen: a change through ``parameter.data``.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        # Read in every search: looking at these tuples takes a tenth of the time of named_modules.
        self._parts = [(part, *_contents(part)) for part in module.modules()]
        self._versions = self._read_versions()

    def is_current(self) -> bool:
        """Whether nothing changed."""
        for part, parts, parameters in self._parts:
            if part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__:
                return False
            if _contents(part) != (parts, parameters):
                return False
        return self._versions == self._read_versions()

    def _read_versions(self) -> list[tuple[int, int]]:
        return [
            # Tensors made in inference mode have no version, and cannot be changed outside of it.
            (parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version)
            for part, _, _ in self._parts
            for parameter in part._parameters.values()
            if parameter is not None
        ]


def _contents(part: nn.Module) -> tuple[list[int], list[int]]:
    return list(map(id, part._modules.values())), list(map(id, part._parameters.values()))


def _weight(part: nn.Module | None) -> Tensor | None:
    return None if part is None else _detached(part.weight)  # type: ignore[arg-type]


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
