"""The base class of the adapters, and the attention calls that they share."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fused_attn import composed, functional, modules, scores
from fused_attn.checks import autocast
from fused_attn.reference import Masking, zero_uncounted_rows


class Adapter(nn.Module):
    """A layer with the interface of another toolkit's layer, the peer, on our operators.

    It has the peer's constructor and forward. Its parameters have the peer's names and shapes, so
    that the peer's state_dict loads unchanged. Unlike in some peers, rows whose positions are all
    masked give 0, and padding is never read.
    """

    peer: ClassVar[str]  # project and class, for messages
    peer_class: ClassVar[str]  # the name of the peer's class
    signatures: ClassVar[tuple[tuple[str, ...], ...]]  # the argument names of its forward

    @classmethod
    def options_of(cls, layer: nn.Module) -> dict[str, Any]:
        """The constructor arguments of ``layer``. AttributeError if it lacks an expected part."""
        raise NotImplementedError

    @classmethod
    def objection(cls, layer: nn.Module) -> str | None:
        """Why ``layer`` is not the peer's layer, in a few words; None if it is."""
        names = tuple(inspect.signature(layer.forward).parameters)
        if names not in cls.signatures:
            return f"its forward takes ({', '.join(names)})"
        try:
            with torch.device("meta"):
                twin = cls(**cls.options_of(layer))
        except (AttributeError, IndexError, TypeError, ValueError, KeyError) as error:
            return f"its submodules differ ({error})"
        shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
        if shapes != {name: tuple(p.shape) for name, p in twin.named_parameters()}:
            return f"its parameters differ (it has {', '.join(shapes) or 'none'})"
        return None

    @classmethod
    def adopt(cls, layer: nn.Module) -> Self:
        """Return an adapter that shares the parameters of ``layer``, in the same training mode."""
        with torch.device("meta"):
            adapter = cls(**cls.options_of(layer))
        for name, _ in list(adapter.named_children()):
            if any(True for _ in getattr(adapter, name).parameters()):
                setattr(adapter, name, getattr(layer, name))
        for name, parameter in list(adapter.named_parameters(recurse=False)):
            if parameter is not None:
                setattr(adapter, name, getattr(layer, name))
        return adapter.train(layer.training)


def attend_dot(
    query: Tensor, memory: Tensor, scale: float | Tensor, masking: Masking
) -> tuple[Tensor, Tensor]:
    """Dot attention of checked arguments, after autocast. Returns context and weights."""
    query, memory = autocast(query, memory)
    return both(functional.attend_dot(query, memory, scale, masking, True, "auto"))


def attend_concat(
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    memory: Tensor,
    masking: Masking,
) -> tuple[Tensor, Tensor]:
    """Like `attend_dot`, for concat. The memory is cast to the dtype of the projections."""
    query_proj, memory_proj, v = autocast(query_proj, memory_proj, v)
    operands = (query_proj, memory_proj, memory_exp, v, memory.to(query_proj.dtype))
    return both(functional.attend_concat(*operands, masking, True, "auto"))


def projected(part: nn.Module, states: Tensor) -> Tensor:
    """``part(states)`` for states whose mask is not known yet, so that padding may hold anything.

    Rows that are not finite are projected as zeros, and their projections are set to NaN. They then
    affect only queries that attend to them, and put no NaN (from 0 * NaN) into the gradient of
    ``part``.
    """
    spoiled = ~states.isfinite().all(dim=-1, keepdim=True)
    return part(states.masked_fill(spoiled, 0.0)).masked_fill(spoiled, torch.nan)


def attend_energy(
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    energy: nn.Module,
    scale: float,
    memory: Tensor,
    masking: Masking,
    normalizer: str = "softmax",
) -> tuple[Tensor, Tensor]:
    """Concat attention with the score ``scale * energy(tanh(q + m))``.

    query_proj (B, T, A) or (B, A), memory_proj (B, S, A), ``energy`` a linear layer A -> 1, the
    rest as in `attend_concat`. An ``energy`` that must be called gets (B, S, A) for one query, as
    in the peer, and (B, T, S, A) for more.
    """
    weight = modules.readable_weight(energy)
    if weight is not None:
        v = weight[0] if scale == 1.0 else weight[0] * scale
        v = v.to(query_proj.dtype)
        if normalizer == "softmax":
            return attend_concat(query_proj, memory_proj, memory_exp, v, memory, masking)
        query_proj, memory_proj, v, memory = autocast(query_proj, memory_proj, v, memory)
        inputs = (_three(query_proj), memory_proj, memory_exp, v)
        found = scores.of_concat(*inputs, masking, "auto")
    else:
        memory_proj = zero_uncounted_rows(memory_proj, masking)  # 0 * tanh'(NaN) would be NaN
        queries = _three(query_proj)
        queries = queries if queries.shape[1] == 1 else queries[:, :, None]
        keys = memory_proj if queries.dim() == 3 else memory_proj[:, None]
        found = energy(torch.tanh(queries + keys)).squeeze(-1) * scale
        found = found if found.dim() == 3 else found[:, None]
    memory = memory.to(query_proj.dtype)
    return attend_scores(found, memory, masking, query_proj.dim() == 2, normalizer)


def attend_keys(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float | Tensor,
    masking: Masking,
    normalizer: str = "softmax",
) -> tuple[Tensor, Tensor]:
    """Dot attention with separate keys (B, S, D) and values (B, S, E)."""
    query, keys, values = autocast(query, keys, values)
    found = scores.of_dot(_three(query), keys, scale, masking)
    return attend_scores(found, values, masking, query.dim() == 2, normalizer)


def attend_scores(
    found: Tensor, memory: Tensor, masking: Masking, is_step: bool, normalizer: str = "softmax"
) -> tuple[Tensor, Tensor]:
    """Context and weights for scores (B, T, S); without the T dimension if ``is_step``."""
    found = scores.counted(found, memory, masking)
    result = composed.attend_scores(found, memory, masking, normalizer, True)
    return both(functional.one_step(*result) if is_step else result)


def both(result: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
    """Context and weights of a call that requested the weights (narrows the type)."""
    context, weights = result
    assert weights is not None
    return context, weights


def _three(query: Tensor) -> Tensor:
    return query if query.dim() == 3 else query.unsqueeze(1)


def normalised(v: Tensor, gain: Tensor | None) -> Tensor:
    """``g v / |v|``, or v if there is no gain g."""
    return v if gain is None else v * (gain / torch.linalg.vector_norm(v))
