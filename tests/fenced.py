"""Operands that lie in larger tensors of NaN, which must neither be read nor written."""

from __future__ import annotations

import torch
from torch import Tensor


def fenced(values: Tensor) -> Tensor:
    """Return the values as a view of a tensor that is NaN everywhere else."""
    around = torch.full([size + 5 for size in values.shape], torch.nan)
    view = around[tuple(slice(2, 2 + size) for size in values.shape)]
    return view.copy_(values)


def untouched(view: Tensor) -> bool:
    """Whether the tensor around a view of `fenced` is still NaN."""
    around = view._base
    assert around is not None
    outside = torch.ones_like(around, dtype=torch.bool)
    outside[tuple(slice(2, 2 + size) for size in view.shape)] = False
    return bool(around[outside].isnan().all())


def blank(*sizes: int) -> Tensor:
    return fenced(torch.full(sizes, torch.nan))
