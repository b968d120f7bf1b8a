"""A wider model that computes, to begin with, what a narrower one does.

Chen, Goodfellow & Shlens 2016, "Net2Net: Accelerating Learning via Knowledge Transfer", section
2.2, with another choice of the new columns: not copies of old ones, which dropout alone would tell
apart, but those that a new model begins with. What nothing old looks at yet changes no result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_attn.seq2seq.config import ModelConfig

# What the new columns meet first on their way into a result that the old ones have a part in: here
# the new rows are zeros too.
_BEGIN_AT_ZERO = (
    "decoder.attention.v",  # the sum over the columns of the concat score
    "decoder.attention.position.v",  # that of a predicted position
    "memory_proj.weight",  # the projected memory, whose columns the dot score multiplies
)
_OF_GENERAL = "decoder.attention.query_proj.weight"  # W_a: the same for the general score


def can_grow(before: ModelConfig, config: ModelConfig) -> bool:
    """Whether `grown` makes a model of ``config`` of one of ``before``.

    The layers, all of them, get wider, and nothing else changes but dropout. A dot score of states
    as they are has no parameter that could leave the new columns out.
    """
    unprojected_dot = config.score == "dot" and config.memory_dim == config.hidden
    same: dict[str, Any] = {
        "hidden": config.hidden,
        "dropout": config.dropout,
        "variational": config.variational,
    }
    return (
        before.hidden < config.hidden
        and config.encoder_hidden is None
        and not unprojected_dot
        and replace(before, **same) == config
    )


def grown(
    before: ModelConfig,
    parameters: Mapping[str, Tensor],
    config: ModelConfig,
    fresh: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return parameters of a model of ``config`` that computes what ``parameters`` do.

    parameters: of a model of ``before``, which `can_grow`. fresh: of a new model of ``config``. A
    new row of a matrix keeps what the new model has; an old one takes no notice of new columns.

    Raises KeyError or ValueError if the parameters are not of models of these shapes.
    """
    return {
        name: _grown(
            name in _BEGIN_AT_ZERO or (name == _OF_GENERAL and config.score == "general"),
            parameters[name],
            fresh[name],
            (before.hidden, config.hidden),
        )
        for name in fresh
    }


def _grown(all_zero: bool, old: Tensor, fresh: Tensor, widths: tuple[int, int]) -> Tensor:
    places = [_places(a, b, widths) for a, b in zip(old.shape, fresh.shape, strict=True)]
    found = torch.zeros_like(fresh) if all_zero else fresh.clone()
    if not places:
        return old.to(fresh.dtype)
    found[places[0]] = 0
    found[torch.meshgrid(*places, indexing="ij")] = old.to(fresh.dtype)
    return found


def _places(old: int, new: int, widths: tuple[int, int]) -> Tensor:
    """Where the ``old`` columns are among the ``new``.

    They are blocks as wide as a layer: the gates of a cell, the directions of an encoder, the
    memory and the query side by side. What has a width of its own, the embedding, comes first.
    """
    before, after = widths
    blocks = (new - old) // (after - before)
    first = old - blocks * before
    if first < 0 or first + blocks * after != new:
        raise ValueError(f"{old} and {new} columns are not of layers {before} and {after} wide")
    starts = first + after * torch.arange(blocks)
    return torch.cat((torch.arange(first), (starts[:, None] + torch.arange(before)).flatten()))
