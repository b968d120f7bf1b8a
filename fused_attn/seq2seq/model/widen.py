"""Initialise a wider model so that it computes the same function as a narrower one.

Chen, Goodfellow & Shlens 2016, "Net2Net: Accelerating Learning via Knowledge Transfer", section
2.2, except for the choice of the new columns: not copies of old columns, which only dropout would
tell apart, but the initial values of a new model. The old units give the new ones a weight of 0, so
no result changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_attn.seq2seq.config import ModelConfig

# These parameters sum over old and new columns, so their new rows must be 0, too.
_BEGIN_AT_ZERO = (
    "decoder.attention.v",  # sums the columns of the concat score
    "decoder.attention.position.v",  # sums the columns of the predicted position
    "memory_proj.weight",  # makes the memory columns that the dot score multiplies
)
_PROJECTION = "output_proj.weight"  # to the width of a tied embedding
_OF_GENERAL = "decoder.attention.query_proj.weight"  # W_a, likewise for the general score


def can_grow(before: ModelConfig, config: ModelConfig) -> bool:
    """Whether `grown` can turn a model of the shape ``before`` into one of the shape ``config``.

    All layers must get wider, and nothing else may change except dropout. A dot score without a
    memory projection cannot grow: it has no parameter that could ignore the new columns. Nor can a
    model in which another width would add or remove a residual connection around a first layer, or
    remove the projection to a tied embedding.
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
        and not (config.tie is not None and before.embedding == config.hidden)
        and (not config.residual or _equal_widths(before) == _equal_widths(config))
        and replace(before, **same) == config
    )


def _equal_widths(config: ModelConfig) -> tuple[bool, bool]:
    """Whether the first layers of the encoder and of the decoder are as wide as their inputs."""
    fed = config.embedding + (config.hidden if config.input_feeding else 0)
    return config.embedding == config.memory_dim, fed == config.hidden


def grown(
    before: ModelConfig,
    parameters: Mapping[str, Tensor],
    config: ModelConfig,
    fresh: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return parameters for the shape ``config`` that compute the same function as ``parameters``.

    parameters: of a model of the shape ``before``; `can_grow` must hold.
    fresh: of a newly initialised model of the shape ``config``. New rows of a matrix keep these
        values; in old rows the new columns are 0.

    Raises KeyError or ValueError if the parameters do not have these shapes.
    """
    if before.tie is not None and before.embedding == before.hidden:
        parameters = {**parameters, _PROJECTION: torch.eye(before.hidden)}  # as if it had one
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
    indices = [_indices(a, b, widths) for a, b in zip(old.shape, fresh.shape, strict=True)]
    wider = torch.zeros_like(fresh) if all_zero else fresh.clone()
    if not indices:
        return old.to(fresh.dtype)
    wider[indices[0]] = 0
    wider[torch.meshgrid(*indices, indexing="ij")] = old.to(fresh.dtype)
    return wider


def _indices(old: int, new: int, widths: tuple[int, int]) -> Tensor:
    """Return the index of each of the ``old`` columns among the ``new`` ones, int64 (old,).

    The columns form blocks of the width of a layer: the gates of a cell, the directions of an
    encoder, or memory and query concatenated. An embedding, whose width stays, comes first.
    """
    before, after = widths
    blocks = (new - old) // (after - before)
    first = old - blocks * before
    if first < 0 or first + blocks * after != new:
        raise ValueError(
            f"cannot grow {old} columns to {new}: expected blocks of width {before} to become "
            f"blocks of width {after}"
        )
    starts = first + after * torch.arange(blocks)
    return torch.cat((torch.arange(first), (starts[:, None] + torch.arange(before)).flatten()))
