"""TensorFlow Addons: `LuongAttention` and `BahdanauAttention`, as PyTorch modules.

As in TensorFlow, the widths of the memory and of a Bahdanau query are taken from the first tensors.
`load_kernels` takes the result of the original's `layer.get_weights()`.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fused_attn.checks import check_bounds, check_lengths, check_mask, check_memory
from fused_attn.interop.adapter import attend_concat, attend_dot, attend_keys, normalised
from fused_attn.modules import beside_forward, read_only, readable_weight
from fused_attn.prepared import PreparedMemory, exponentials
from fused_attn.reference import Masking, zero_uncounted_rows


def _dense(units: int) -> nn.LazyLinear:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns that lazy modules are new
        return nn.LazyLinear(units, bias=False)


class _Mechanism(nn.Module):
    """The base class: a memory is set once, then every step attends to it."""

    def __init__(
        self, units: int, memory: Tensor | None, lengths: Tensor | None, probability_fn: str
    ) -> None:
        super().__init__()
        if probability_fn != "softmax":
            raise ValueError(f"probability_fn must be 'softmax', got {probability_fn!r}")
        self.units = units
        self.memory_layer = _dense(units)
        self.memory: PreparedMemory | None = None
        self._first = (memory, lengths)

    def _set_first(self) -> None:
        memory, lengths = self._first
        self._first = (None, None)
        if memory is not None:
            self.setup_memory(memory, lengths)

    @beside_forward
    def setup_memory(
        self,
        memory: Tensor,
        memory_sequence_length: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> PreparedMemory:
        """Set the memory (B, S, E), with lengths (B,), a mask (B, S) (True = attend), or neither.

        Returns what is stored on the module, for fully_shard's hooks on results. Raises TypeError
        or ValueError if the memory, the lengths or the mask cannot be used.
        """
        if memory_sequence_length is not None and memory_mask is not None:
            raise ValueError(
                "memory_sequence_length must be None if memory_mask is given, got both"
            )
        check_memory(memory)
        lengths = check_lengths(memory_sequence_length, memory)
        check_bounds(lengths, memory)
        mask = check_mask(memory_mask, memory, 1)
        if mask is not None and mask.dim() == 2:
            mask = mask.unsqueeze(1)
        self.memory = prepared = self._prepare(memory, Masking(lengths, mask))
        return prepared

    def _prepare(self, memory: Tensor, masking: Masking) -> PreparedMemory:
        raise NotImplementedError

    def _set(self) -> PreparedMemory:
        if self.memory is None:
            raise ValueError("setup_memory must be called before a query is attended")
        return self.memory

    @beside_forward
    def attend(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Return the context (B, E) and the alignments (B, S) of a query (B, D).

        In TensorFlow the context is computed by AttentionWrapper.
        """
        return self._attend(query)

    def _attend(self, query: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward(self, inputs: tuple[Tensor, Any]) -> tuple[Tensor, Tensor]:
        """inputs: [query (B, units), state]. Returns the alignments (B, S) twice; ignores state."""
        query, _ = inputs
        _, alignments = self._attend(query)
        return alignments, alignments


class TFALuongAttention(_Mechanism):
    """tfa.seq2seq.LuongAttention: the general score, with its matrix applied to the memory.

    Because of ``g (q . W m) = g (W^T q) . m`` the query is projected here. If ``memory_layer`` is
    wrapped (by hooks, LoRA, sharding), it projects the memory as in the original. ``units`` must be
    the width of the query. The parameter ``attention_g`` () exists with ``scale``.
    """

    peer = "TensorFlow Addons LuongAttention"

    def __init__(
        self,
        units: int,
        memory: Tensor | None = None,
        memory_sequence_length: Tensor | None = None,
        scale: bool = False,
        probability_fn: str = "softmax",
    ) -> None:
        super().__init__(units, memory, memory_sequence_length, probability_fn)
        self.attention_g = nn.Parameter(torch.ones(())) if scale else None
        self._set_first()

    def _prepare(self, memory: Tensor, masking: Masking) -> PreparedMemory:
        keys = None
        if self._weight() is None:  # a call also sets the width of a lazy layer
            keys = self.memory_layer(zero_uncounted_rows(memory, masking))
        return PreparedMemory("general", memory, keys, None, masking[0], masking[1])

    def _attend(self, query: Tensor) -> tuple[Tensor, Tensor]:
        held = self._set()
        scale = 1.0 if self.attention_g is None else self.attention_g
        masking = Masking(held.memory_lengths, held.memory_mask)
        weight = self._weight()
        if held.memory_proj is None and weight is not None:
            return attend_dot(query @ weight, held.memory, scale, masking)
        if held.memory_proj is None:  # wrapped after setup_memory
            self.memory = held = self._prepare(held.memory, masking)
        assert held.memory_proj is not None
        return attend_keys(query, held.memory_proj, held.memory, scale, masking)

    def _weight(self) -> Tensor | None:
        return readable_weight(self.memory_layer, at_call=False)

    def load_kernels(self, weights: list[Any]) -> None:
        """Load ``get_weights()``: the kernel (E, units), and attention_g with ``scale``.

        Raises ValueError for a wrong number or shape of arrays.
        """
        _load(self, weights, ["memory_layer.weight", "attention_g"])


class TFABahdanauAttention(_Mechanism):
    """tfa.seq2seq.BahdanauAttention: concat score; ``normalize``: with ``g v / |v|`` and a bias."""

    peer = "TensorFlow Addons BahdanauAttention"

    def __init__(
        self,
        units: int,
        memory: Tensor | None = None,
        memory_sequence_length: Tensor | None = None,
        normalize: bool = False,
        probability_fn: str = "softmax",
    ) -> None:
        super().__init__(units, memory, memory_sequence_length, probability_fn)
        self.query_layer = _dense(units)
        bound = math.sqrt(3.0 / units)  # glorot_uniform of a vector
        self.attention_v = nn.Parameter(torch.empty(units).uniform_(-bound, bound))
        self.attention_g = nn.Parameter(torch.tensor(units**-0.5)) if normalize else None
        self.attention_b = nn.Parameter(torch.zeros(units)) if normalize else None
        self._set_first()

    def _prepare(self, memory: Tensor, masking: Masking) -> PreparedMemory:
        proj = self.memory_layer(zero_uncounted_rows(memory, masking))
        fields = (proj, exponentials(proj), masking[0], masking[1])
        return PreparedMemory("concat", memory, *fields)

    def _attend(self, query: Tensor) -> tuple[Tensor, Tensor]:
        held = self._set()
        query_proj = self.query_layer(query)
        if self.attention_b is not None:
            query_proj = query_proj + self.attention_b
        v = normalised(self.attention_v, self.attention_g)
        masking = Masking(held.memory_lengths, held.memory_mask)
        assert held.memory_proj is not None
        operands = (query_proj, held.memory_proj, held.memory_exp, v, held.memory)
        return attend_concat(*operands, masking)

    def load_kernels(self, weights: list[Any]) -> None:
        """Load ``get_weights()``: attention_v, then with ``normalize`` attention_g and attention_b,
        then the kernels of query_layer and memory_layer, (input width, units). Raises ValueError
        for a wrong number or shape of arrays.
        """
        names = ["attention_v", "attention_g", "attention_b"]
        _load(self, weights, [*names, "query_layer.weight", "memory_layer.weight"])


def _load(layer: nn.Module, weights: list[Any], names: list[str]) -> None:
    """Fill parameters from arrays. TensorFlow's kernels are transposed."""
    if reason := read_only(layer):
        raise ValueError(f"load_kernels cannot write the weights: {reason}. Remove that first")
    present = [name for name in names if getattr(layer, name, True) is not None]
    if len(weights) != len(present):
        raise ValueError(f"weights must hold {', '.join(present)}, got {len(weights)} arrays")
    with torch.no_grad():
        for name, value in zip(present, weights, strict=True):
            array = torch.as_tensor(value)
            if not name.endswith(".weight"):
                target = getattr(layer, name)
                if target.shape != array.shape:
                    raise ValueError(
                        f"{name} must have shape {tuple(target.shape)}, got {tuple(array.shape)}"
                    )
                target.copy_(array)
                continue
            dense = getattr(layer, name.removesuffix(".weight"))
            if array.dim() != 2 or array.shape[1] != dense.out_features:
                raise ValueError(
                    f"{name} must have shape (input width, {dense.out_features}), "
                    f"got {tuple(array.shape)}"
                )
            if isinstance(dense, nn.LazyLinear):
                dense(array.new_zeros(0, array.shape[0], dtype=dense.weight.dtype))
            dense.weight.copy_(array.T)
