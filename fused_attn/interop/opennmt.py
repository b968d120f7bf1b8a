"""OpenNMT-py and eole: `GlobalAttention`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fused_attn import composed
from fused_attn.checks import autocast, check_lengths, check_mask, check_memory, check_query
from fused_attn.interop.adapter import Adapter, attend_dot, attend_energy, attend_keys
from fused_attn.reference import Masking, zero_uncounted_rows


class OpenNMTGlobalAttention(Adapter):
    """onmt.modules.GlobalAttention of OpenNMT-py 3: dot, general or mlp, with the output layer.

    forward(src (B, T, dim) or (B, dim), enc_out (B, S, dim), src_len (B,), coverage (B, S))
    returns the attentional state (B, T, dim) and the weights (B, T, S), batch first. The output
    layer takes [context; query]; with "mlp" it has a bias and no tanh. Coverage replaces the memory
    by ``tanh(memory + w c)``, here in a copy, while OpenNMT-py writes to the caller's tensor.
    """

    peer = "OpenNMT-py GlobalAttention"
    peer_class = "GlobalAttention"
    signatures: ClassVar[tuple[tuple[str, ...], ...]] = (("src", "enc_out", "src_len", "coverage"),)

    def __init__(
        self, dim: int, coverage: bool = False, attn_type: str = "dot", attn_func: str = "softmax"
    ) -> None:
        super().__init__()
        if attn_type not in ("dot", "general", "mlp"):
            raise ValueError(f"attn_type must be 'dot', 'general' or 'mlp', got {attn_type!r}")
        if attn_func not in composed.NORMALIZERS:
            raise ValueError(f"attn_func must be 'softmax' or 'sparsemax', got {attn_func!r}")
        self.dim = dim
        self.attn_type = attn_type
        self.attn_func = attn_func
        if attn_type == "general":
            self.linear_in = nn.Linear(dim, dim, bias=False)
        elif attn_type == "mlp":
            self.linear_context = nn.Linear(dim, dim, bias=False)
            self.linear_query = nn.Linear(dim, dim, bias=True)
            self.v = nn.Linear(dim, 1, bias=False)
        self.linear_out = nn.Linear(2 * dim, dim, bias=attn_type == "mlp")
        if coverage:
            self.linear_cover = nn.Linear(1, dim, bias=False)

    @classmethod
    def options_of(cls, layer: Any) -> dict[str, Any]:
        names = ("dim", "attn_type", "attn_func")
        options = {name: getattr(layer, name) for name in names}
        return options | {"coverage": getattr(layer, "linear_cover", None) is not None}

    def forward(
        self,
        src: Tensor,
        enc_out: Tensor,
        src_len: Tensor | None = None,
        coverage: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return self._run(src, enc_out, src_len, None, coverage)

    def _run(
        self,
        source: Tensor,
        memory: Tensor,
        lengths: Tensor | None,
        mask: Tensor | None,
        coverage: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """mask: bool (B, 1, S), True = attend."""
        source, memory = autocast(source, memory)
        check_memory(memory)
        check_query(source, memory, "dim", self.dim)
        masking = Masking(check_lengths(lengths, memory), check_mask(mask, memory, 1))
        if coverage is not None:
            if not hasattr(self, "linear_cover"):
                raise ValueError("coverage must be None unless the layer has coverage=True")
            memory = zero_uncounted_rows(memory, masking)
            cover = zero_uncounted_rows(coverage[..., None].to(memory.dtype), masking)
            memory = torch.tanh(memory + self.linear_cover(cover))
        context, weights = self._attend(source, memory, masking)
        state = self.linear_out(torch.cat((context, source), dim=-1))
        return state if self.attn_type == "mlp" else torch.tanh(state), weights

    def _attend(self, query: Tensor, memory: Tensor, masking: Masking) -> tuple[Tensor, Tensor]:
        if self.attn_type == "mlp":
            query = self.linear_query(query)
            proj = self.linear_context(zero_uncounted_rows(memory, masking))
            operands = (query, proj, None, self.v, 1.0, memory)
            return attend_energy(*operands, masking, self.attn_func)
        query = self.linear_in(query) if self.attn_type == "general" else query
        if self.attn_func == "softmax":
            return attend_dot(query, memory, 1.0, masking)
        return attend_keys(query, memory, memory, 1.0, masking, self.attn_func)


class OpenNMT2GlobalAttention(OpenNMTGlobalAttention):
    """onmt.modules.GlobalAttention of OpenNMT-py 1 and 2.

    The same layer, but forward(source, memory_bank, memory_lengths, coverage) returns its results
    time first: the state (T, B, dim) and the weights (T, B, S) of a query (B, T, dim).
    """

    peer = "OpenNMT-py 2 GlobalAttention"
    signatures = (("source", "memory_bank", "memory_lengths", "coverage"),)

    def forward(
        self,
        source: Tensor,
        memory_bank: Tensor,
        memory_lengths: Tensor | None = None,
        coverage: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        state, weights = self._run(source, memory_bank, memory_lengths, None, coverage)
        if source.dim() == 3:
            state, weights = state.transpose(0, 1), weights.transpose(0, 1)
        return state, weights


class EoleGlobalAttention(OpenNMTGlobalAttention):
    """eole.modules.GlobalAttention: the same layer, with a mask instead of lengths.

    forward(src, enc_out, src_pad_mask bool (B, 1, S) with True = ignore, coverage).
    """

    peer = "eole GlobalAttention"
    signatures = (("src", "enc_out", "src_pad_mask", "coverage"),)

    def forward(
        self,
        src: Tensor,
        enc_out: Tensor,
        src_pad_mask: Tensor | None = None,
        coverage: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        keep = None if src_pad_mask is None else ~src_pad_mask
        return self._run(src, enc_out, None, keep, coverage)
