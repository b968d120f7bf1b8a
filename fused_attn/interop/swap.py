"""Replace the attention layers of an existing model by ours, in place, keeping their weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fused_attn.interop.adapter import Adapter
from fused_attn.interop.fairseq import FairseqAttentionLayer
from fused_attn.interop.gnmt import GNMTBahdanauAttention
from fused_attn.interop.joeynmt import JoeyBahdanauAttention, JoeyLuongAttention
from fused_attn.interop.opennmt import (
    EoleGlobalAttention,
    OpenNMT2GlobalAttention,
    OpenNMTGlobalAttention,
)
from fused_attn.interop.speechbrain import ContentBasedAttention, LocationAwareAttention
from fused_attn.interop.tutorial import TutorialAttn
from fused_attn.modules import hooks_of

ADAPTERS: tuple[type[Adapter], ...] = (
    OpenNMTGlobalAttention,
    OpenNMT2GlobalAttention,
    EoleGlobalAttention,
    JoeyBahdanauAttention,
    JoeyLuongAttention,
    FairseqAttentionLayer,
    GNMTBahdanauAttention,
    TutorialAttn,
    ContentBasedAttention,
    LocationAwareAttention,
)


@dataclass(frozen=True)
class Swapped:
    """One layer that was replaced."""

    path: str  # in the model, as in named_modules
    peer: str
    adapter: str


@dataclass(frozen=True)
class Report:
    """The layers that `swap` replaced, and those with a peer's name that it did not."""

    swapped: tuple[Swapped, ...]
    refused: tuple[tuple[str, str], ...]  # path and reason

    def __str__(self) -> str:
        lines = [
            f"{row.path or '(the model)'}: {row.peer} -> {row.adapter}" for row in self.swapped
        ]
        lines += [f"{path}: not replaced, {reason}" for path, reason in self.refused]
        return "\n".join(lines) or "no known attention layer found"


def find(layer: nn.Module) -> tuple[type[Adapter] | None, str | None]:
    """The adapter for a layer, or the reason that a layer with a peer's name has none."""
    candidates = [adapter for adapter in ADAPTERS if type(layer).__name__ == adapter.peer_class]
    if not candidates or isinstance(layer, Adapter):
        return None, None
    if hooks := hooks_of(layer):
        return None, f"it has hooks ({', '.join(hooks)}), which would be lost"
    reasons = []
    for adapter in candidates:
        objection = adapter.objection(layer)
        if objection is None:
            return adapter, None
        reasons.append(f"not the {adapter.peer}: {objection}")
    return None, "; ".join(reasons)


def swap(model: nn.Module) -> Report:
    """Replace the attention layers of other toolkits in ``model``, in place. Returns a `Report`.

    Layers are recognised by the name of their class, the arguments of their forward, and the names
    and shapes of their parameters; no other toolkit is imported. The adapter shares the parameters
    of the layer, so optimizers and tied weights are not affected. A layer that is used in two
    places stays shared. If the model itself is such a layer, use ``Adapter.adopt``.
    """
    swapped: list[Swapped] = []
    refused: list[tuple[str, str]] = []
    made: dict[nn.Module, Adapter] = {}
    for path, parent in list(model.named_modules(remove_duplicate=True)):
        for name, child in list(parent._modules.items()):
            if child is None:
                continue
            place = f"{path}.{name}" if path else name
            if child not in made:
                kind, reason = find(child)
                if reason is not None:
                    refused.append((place, reason))
                if kind is None:
                    continue
                made[child] = kind.adopt(child)
            adapter = made[child]
            parent._modules[name] = adapter
            swapped.append(Swapped(place, adapter.peer, type(adapter).__name__))
    return Report(tuple(swapped), tuple(refused))
