"""What all adapters share: how one is made from a peer's layer that exists already."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn


class Adapter(nn.Module):
    """A layer with a peer's constructor, parameters and forward, on our operators.

    Parameters have the peer's names and shapes, so that its state_dict loads as it is. Rows with
    nothing to attend to give 0, and padding is never read, whatever the peer does there.
    """

    peer: ClassVar[str]  # project and class, for people
    peer_class: ClassVar[str]  # the class's name
    signatures: ClassVar[tuple[tuple[str, ...], ...]]  # names of the arguments of its forward

    @classmethod
    def options_of(cls, layer: nn.Module) -> dict[str, Any]:
        """The constructor's arguments that made ``layer``. AttributeError if it has other parts."""
        raise NotImplementedError

    @classmethod
    def objection(cls, layer: nn.Module) -> str | None:
        """Why ``layer`` is not the peer's, in a few words; None if it is."""
        names = tuple(inspect.signature(layer.forward).parameters)
        if names not in cls.signatures:
            return f"its forward takes ({', '.join(names)})"
        try:
            with torch.device("meta"):
                twin = cls(**cls.options_of(layer))
        except (AttributeError, IndexError, TypeError, ValueError, KeyError) as error:
            return f"its parts are others ({error})"
        shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
        if shapes != {name: tuple(p.shape) for name, p in twin.named_parameters()}:
            return f"its parameters are others ({', '.join(shapes) or 'none'})"
        return None

    @classmethod
    def adopt(cls, layer: nn.Module) -> Self:
        """An adapter that holds the very parameters of ``layer``, and its mode."""
        with torch.device("meta"):
            adapter = cls(**cls.options_of(layer))
        for name, _ in list(adapter.named_children()):
            if any(True for _ in getattr(adapter, name).parameters()):
                setattr(adapter, name, getattr(layer, name))
        for name, parameter in list(adapter.named_parameters(recurse=False)):
            if parameter is not None:
                setattr(adapter, name, getattr(layer, name))
        return adapter.train(layer.training)


def normalised(v: Tensor, gain: Tensor | None) -> Tensor:
    """``g v / |v|``, or v if there is no gain."""
    return v if gain is None else v * (gain / torch.linalg.vector_norm(v))
