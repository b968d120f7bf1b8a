"""Describe decoders to the native module, which packs their weights and runs them in one call.

A description is a dict of float32 tensors on the CPU, in torch's own layouts, and of options; see
``PackedModel`` in csrc/packed_spec.cpp. `module_reasons` and `attention_reasons` tell what cannot
be described.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from fused_attn import backends, modules
from fused_attn.attention import LuongAttention
from fused_attn.layer_parts import AlignmentHistory, NormedLinear, PredictedPosition

_BACKENDS = ("auto", "cpu")

# Modules that compute from their parameters what their class says, and nothing else.
_PLAIN: tuple[type[nn.Module], ...] = (
    *(nn.Linear, nn.Embedding, nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell),
    *(nn.Identity, nn.ModuleList, LuongAttention, AlignmentHistory, PredictedPosition),
)
# Named by the option of the attention that they belong to.
_OF_OPTIONS = (nn.Conv1d, nn.LayerNorm, NormedLinear)


def native_module() -> Any:
    """Return the native module, None if it is not there."""
    cpu: Any = backends.load("cpu")
    return None if cpu.unavailable_reasons() else cpu.native


def reasons_of_now(*asked: str) -> list[str]:
    """Return why layers with these backends do not run natively now, whatever their parts are."""
    if torch.is_autocast_enabled("cpu"):
        return ["autocast is on"]
    if modules.has_global_hooks():
        return ["there are global module hooks"]
    return [reason for backend in asked for reason in backend_reasons(backend)]


def backend_reasons(backend: str) -> list[str]:
    """Return why a layer with this ``backend`` does not run natively; empty if it does."""
    if backend not in _BACKENDS:
        return [f"backend={backend!r} was asked for"]
    if backend == "auto" and (asked := backends.default_request()) not in _BACKENDS:
        return [f"FUSED_ATTN_BACKEND={asked} was asked for"]
    return [] if native_module() is not None else backends.unavailable_reasons("cpu")


def module_reasons(module: nn.Module, known: tuple[type[nn.Module], ...] = ()) -> list[str]:
    """Return why a module computes something other than what its parameters say.

    The module itself is not looked at, only its parts: its hooks run around what it computes.

    known: further classes that compute what the native module computes for them.
    """
    reasons = ["there are global module hooks"] if modules.has_global_hooks() else []
    kinds = set()
    for path, part in module.named_modules():
        if path and (reason := _objection(part, (*_PLAIN, *known))):
            reasons.append(f"{path} {reason}")
        for parameter in part._parameters.values():
            if isinstance(parameter, Tensor):
                kinds.add((parameter.device.type, str(parameter.dtype).removeprefix("torch.")))
    if kinds - {("cpu", "float32")}:
        told = ", ".join(f"{dtype} on {device}" for device, dtype in sorted(kinds))
        reasons.append(f"the parameters must be float32 on cpu, got {told}")
    return reasons


def _objection(part: nn.Module, known: tuple[type[nn.Module], ...]) -> str | None:
    """Why the parameters of a part do not say what it computes, or None if they do."""
    if isinstance(part, _OF_OPTIONS):
        return None
    if hooks := modules.hooks_of(part):
        return f"has hooks ({', '.join(hooks)})"
    if type(part) not in known:
        return f"is a {type(part).__name__}"
    if getattr(part, "nonlinearity", "tanh") != "tanh":
        return f"has nonlinearity={part.nonlinearity!r}"
    if getattr(part, "max_norm", None) is not None:
        return "has max_norm, which changes its weight at each call"
    native = native_module()
    for name, parameter in part._parameters.items():
        if parameter is None:
            continue
        if type(parameter) not in (Tensor, nn.Parameter):
            return f"has a {type(parameter).__name__} as its {name}"
        if native is not None and parameter.is_cpu and not native.are_plain(parameter):
            return f"has a {name} that is not dense, or is a lazy negation"
    return None


def attention_reasons(attention: LuongAttention) -> list[str]:
    """Return which options of an attention layer the native decoder lacks."""
    reasons = []
    if attention.layer_norm:
        reasons.append("attention has layer_norm=True")
    if attention.normalizer != "softmax":
        reasons.append(f"attention has normalizer={attention.normalizer!r}")
    if attention.history is not None and attention.history.channels:
        reasons.append(f"attention has conv_channels={attention.history.channels}")
    if attention.training and attention.dropout:
        reasons.append(f"attention has dropout={attention.dropout:g} in training mode")
    if attention.backend not in _BACKENDS:
        reasons.append(f"attention has backend={attention.backend!r}")
    return reasons


def attention_options(attention: LuongAttention) -> tuple[Any, ...]:
    """What the packed form of an attention layer depends on besides its parameters."""
    options = (attention.score, attention.local, attention.window, attention.normalizer)
    scale = attention.scale
    fixed = None if isinstance(scale, Tensor) else scale
    switches = (attention.layer_norm, attention.training, attention.dropout)
    return *options, fixed, *switches, attention.backend


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
        "query_weight": weight_of(query),
        "query_bias": None if query is None else detached(query.bias),
        "memory_weight": weight_of(memory),
        "v": attention._vector().detach() if attention.score == "concat" else None,
        "scale": scale,
        "coverage_weight": (
            attention.history.coverage_proj.weight.detach()[:, 0]
            if covers and attention.history is not None
            else None
        ),
        "local": attention.local,
        "window": float(attention.window),
        "position_weight": None if position is None else weight_of(position.proj),
        "position_v": None if position is None else position.v.detach(),
        "combine_weight": weight_of(output),
        "combine_bias": None if output is None else detached(output.bias),
    }


def layer_spec(layer: nn.Module, end: str = "") -> tuple[Tensor | None, ...]:
    """Return weight_ih, weight_hh, bias_ih and bias_hh of a cell or a recurrent layer.

    end: what the names of the parameters end with, such as "_l0_reverse".
    """
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return tuple(detached(getattr(layer, name + end, None)) for name in names)


class _FusedSteps:
    """Counts the steps of fused optimizers, which do not increase the versions of parameters."""

    def __init__(self) -> None:
        self.count = 0
        self._is_counting = False

    def start(self) -> None:
        if not self._is_counting:
            self._is_counting = True
            register_optimizer_step_post_hook(self._add)

    def _add(self, optimizer: Optimizer, *_: object) -> None:
        self.count += any(group.get("fused") for group in optimizer.param_groups)


_FUSED_STEPS = _FusedSteps()


class Snapshot:
    """The parameters of a module at one time, to see whether they changed since.

    Seen: a parameter or a part that was replaced, a hook that was added, a change of a parameter in
    place, a changed option of an attention layer. After a step of any fused optimizer, all counts
    as changed. A change through ``parameter.data``, or of a parameter that was made in inference
    mode, has no version. It is seen if it changes one of the eight elements that are read of each
    parameter, as new values for all elements do.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        _FUSED_STEPS.start()
        self._fused_steps = _FUSED_STEPS.count
        self._native = native_module()
        # Read in every search: for the bundled model, looking at these takes a fifth of the time of
        # `hooks_of` for every part (6 against 34 us, 2026-11-28).
        parts = list(module.modules())
        inside = parts[1:]  # hooks of the module itself run around what it computes
        self._own = [part.__dict__ for part in inside]
        self._hooks = [hooks for part in inside for hooks in modules.hook_dicts(part)]
        self._children = [(part._modules, list(part._modules.values())) for part in parts]
        self._places = [part._parameters for part in parts]
        # Kept alive, or a new parameter could have the identity and the memory of an old one.
        self._parameters = [dict(place) for place in self._places]
        self._storages = [parameter.untyped_storage() for parameter in module.parameters()]
        self._bytes = self._held_bytes()
        self._identity = self._native.identity(self._places)
        self._sample = self._native.sample(self._places)
        self._attentions = [part for part in parts if isinstance(part, LuongAttention)]
        self._options = list(map(attention_options, self._attentions))

    def is_current(self) -> bool:
        """Whether nothing changed."""
        if self._fused_steps != _FUSED_STEPS.count:
            return False
        if any(self._hooks) or any("forward" in own for own in self._own):
            return False
        if any(list(now.values()) != before for now, before in self._children):
            return False
        if self._options != list(map(attention_options, self._attentions)):
            return False
        if self._identity is None or self._native.identity(self._places) != self._identity:
            return False
        # The storage of a parameter may have been freed; its elements must not be read then.
        return (
            self._held_bytes() == self._bytes and self._native.sample(self._places) == self._sample
        )

    def _held_bytes(self) -> list[int]:
        return [storage.nbytes() for storage in self._storages]


def weight_of(part: nn.Module | None) -> Tensor | None:
    """Return the weight of a linear layer or an embedding, None for None."""
    return None if part is None else detached(part.weight)  # type: ignore[arg-type]


def detached(tensor: Tensor | None) -> Tensor | None:
    """Return a tensor without its gradient, None for None."""
    return None if tensor is None else tensor.detach()
