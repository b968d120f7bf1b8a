"""`PreparedMemory`: a memory with everything precomputed that does not depend on the query."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fused_attn.reference import arithmetic_dtype

# exp(2m) is used for |m| up to this bound, so that it fits in float32; see `exponentials`. The
# bound in kernels/step.py and csrc/attention_params.h must be the same.
LARGEST_PROJECTION = 43.0


def exponentials(memory_proj: Tensor) -> Tensor:
    """Return ``exp(2 m)`` for a memory projection m (B, S, A), and -1 where it could overflow.

    With E = exp(2q) exp(2m), tanh(q + m) = 1 - 2 / (1 + E), so a decoding step computes no
    exponentials of the memory. A kernel that reads -1 uses m itself instead. The result is bfloat16
    for bfloat16 (its range is that of float32, and a relative error of the exponential is an
    absolute error of m), float32 for float32 and float16, and float64 for float64.
    """
    dtype = memory_proj.dtype
    m = memory_proj.detach().to(arithmetic_dtype(dtype))
    exp = torch.where(m.abs() <= LARGEST_PROJECTION, torch.exp(2.0 * m), -1.0)
    return exp if dtype == torch.float16 else exp.to(dtype)


@dataclass(frozen=True, eq=False, repr=False)
class PreparedMemory:
    """A memory with everything precomputed that does not depend on the query.

    `LuongAttention.prepare_memory` returns it. Pass it to `LuongAttention.forward` as ``memory`` in
    every decoder step. It is immutable, gradients flow through it, and the module keeps no
    reference to it. It is a pytree, so torch.compile and torch.export accept it as an argument.
    """

    score: str
    memory: Tensor  # (B, S, E)
    memory_proj: Tensor | None = None  # (B, S, A), concat only
    memory_exp: Tensor | None = None  # (B, S, A), `exponentials` of memory_proj
    memory_lengths: Tensor | None = None  # int64 (B,)
    memory_mask: Tensor | None = None  # bool (B, 1 or T, S)

    def __len__(self) -> int:
        """The number of rows B of the batch."""
        return self.memory.shape[0]

    def __repr__(self) -> str:
        parts = [f"score={self.score!r}"]
        parts += [f"{name}={tuple(t.shape)}" for name, t in self._tensors().items()]
        kind = str(self.memory.dtype).removeprefix("torch.")
        return f"PreparedMemory({', '.join(parts)}, dtype={kind}, device={self.memory.device})"

    def index_select(self, rows: Tensor) -> PreparedMemory:
        """Select batch rows by index: ``rows`` int (N,), for example to reorder a batch.

        Raises TypeError for other indices. Beam search needs no copies of a memory: pass K beams as
        a query (B, K, D).
        """
        if not isinstance(rows, Tensor) or rows.dim() != 1 or rows.dtype not in _INDICES:
            raise TypeError(f"rows must be an integer Tensor of shape (N,), got {_told(rows)}")
        return self._map(lambda tensor: tensor.index_select(0, rows))

    def __getitem__(self, rows: slice | Tensor) -> PreparedMemory:
        """Select batch rows by slice (returns views), integer Tensor (N,) or bool Tensor (B,).

        Raises TypeError for any other index.
        """
        if isinstance(rows, slice):
            return self._map(lambda tensor: tensor[rows])
        if isinstance(rows, Tensor) and rows.dtype == torch.bool and rows.shape == (len(self),):
            return self.index_select(rows.nonzero()[:, 0])
        if isinstance(rows, Tensor) and rows.dtype in _INDICES and rows.dim() == 1:
            return self.index_select(rows)
        raise TypeError(
            f"the index of a PreparedMemory of {len(self)} rows must be a slice, an integer Tensor "
            f"(N,) or a bool Tensor ({len(self)},), got {_told(rows)}"
        )

    def to(self, *args: Any, **kwargs: Any) -> PreparedMemory:
        """Like `Tensor.to`. Lengths and mask change device, but keep their dtype."""
        memory = self.memory.to(*args, **kwargs)
        moved = self._map(lambda tensor: tensor.to(memory.device))
        proj = self.memory_proj
        if proj is None or proj.dtype == memory.dtype:
            return replace(moved, memory=memory)
        proj = proj.to(memory)  # the exponentials must agree with the rounded projection
        exp = None if self.memory_exp is None else exponentials(proj)
        return replace(moved, memory=memory, memory_proj=proj, memory_exp=exp)

    def detach(self) -> PreparedMemory:
        """Return the same values, detached from the autograd graph."""
        return self._map(Tensor.detach)

    def _tensors(self) -> dict[str, Tensor]:
        names = (field.name for field in fields(self) if field.name != "score")
        return {name: t for name in names if (t := getattr(self, name)) is not None}

    def _map(self, change: Callable[[Tensor], Tensor]) -> PreparedMemory:
        changed: dict[str, Any] = {name: change(t) for name, t in self._tensors().items()}
        return replace(self, **changed)


_INDICES = (torch.int64, torch.int32)


def _told(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} Tensor of shape {tuple(value.shape)}"
    return repr(value)


def _flatten(value: PreparedMemory) -> tuple[list[Any], str]:
    tensors = value._tensors()
    return list(tensors.values()), " ".join((value.score, *tensors))


def _flatten_with_keys(value: PreparedMemory) -> tuple[list[Any], str]:
    tensors = value._tensors()
    # Not GetAttrKey: torch.export's guards replace names as text, and .memory is a prefix of
    # .memory_proj.
    keyed: list[Any] = [(pytree.MappingKey(name), tensor) for name, tensor in tensors.items()]
    return keyed, " ".join((value.score, *tensors))


def _unflatten(children: Any, context: str) -> PreparedMemory:
    score, *names = context.split()
    return PreparedMemory(score, **dict(zip(names, children, strict=True)))


pytree.register_pytree_node(
    PreparedMemory,
    _flatten,
    _unflatten,
    serialized_type_name="fused_attn.PreparedMemory",
    flatten_with_keys_fn=_flatten_with_keys,
)
torch.serialization.add_safe_globals([PreparedMemory])  # safe: holds only tensors and a string
