"""NVIDIA's GNMT (DeepLearningExamples and MLPerf): `BahdanauAttention`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fused_attn.checks import check_bounds
from fused_attn.interop.adapter import Adapter, attend_concat, normalised
from fused_attn.reference import Masking, zero_uncounted_rows


class GNMTBahdanauAttention(Adapter):
    """seq2seq.models.attention.BahdanauAttention: concat score, optionally weight-normalised.

    Call set_mask(context_len (B,), context), then forward(query, keys), which returns context and
    weights, time first unless ``batch_first``. query is (B, D), (T, B, D), or (B, T, D) with
    batch_first. NVIDIA's layer gives padding the score -65504, so that a row of only padding gets
    uniform weights; here they are 0.
    """

    peer = "NVIDIA GNMT BahdanauAttention"
    peer_class = "BahdanauAttention"
    signatures = (("query", "keys"),)

    def __init__(
        self,
        query_size: int,
        key_size: int,
        num_units: int,
        normalize: bool = False,
        batch_first: bool = False,
        init_weight: float = 0.1,
    ) -> None:
        super().__init__()
        self.normalize = normalize
        self.batch_first = batch_first
        self.num_units = num_units
        self.linear_q = nn.Linear(query_size, num_units, bias=False)
        self.linear_k = nn.Linear(key_size, num_units, bias=False)
        self.linear_att = nn.Parameter(torch.empty(num_units))
        self.mask: Tensor | None = None
        self.normalize_scalar = nn.Parameter(torch.empty(1)) if normalize else None
        self.normalize_bias = nn.Parameter(torch.empty(num_units)) if normalize else None
        self.reset_parameters(init_weight)

    @classmethod
    def options_of(cls, layer: Any) -> dict[str, Any]:
        return {
            "query_size": layer.linear_q.in_features,
            "key_size": layer.linear_k.in_features,
            "num_units": layer.num_units,
            "normalize": layer.normalize,
            "batch_first": layer.batch_first,
        }

    @classmethod
    def adopt(cls, layer: Any) -> GNMTBahdanauAttention:
        adapter = super().adopt(layer)
        adapter.mask = layer.mask
        return adapter

    def reset_parameters(self, init_weight: float) -> None:
        for tensor in (self.linear_q.weight, self.linear_k.weight, self.linear_att):
            nn.init.uniform_(tensor, -init_weight, init_weight)
        if self.normalize_scalar is not None and self.normalize_bias is not None:
            nn.init.constant_(self.normalize_scalar, 1.0 / math.sqrt(self.num_units))
            nn.init.zeros_(self.normalize_bias)

    def set_mask(self, context_len: Tensor, context: Tensor) -> None:
        """Set ``mask`` (B, S), True = ignore, from the lengths context_len (B,)."""
        check_bounds(context_len, context if self.batch_first else context.transpose(0, 1))
        source = context.shape[1 if self.batch_first else 0]
        positions = torch.arange(source, device=context.device)
        self.mask = positions >= context_len.to(context.device)[:, None]

    def forward(self, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        is_turned = not self.batch_first
        memory = keys.transpose(0, 1) if is_turned else keys
        is_turned = is_turned and query.dim() == 3
        query = query.transpose(0, 1) if is_turned else query
        masking = Masking(memory_mask=None if self.mask is None else ~self.mask)
        query_proj = self.linear_q(query)
        if self.normalize_bias is not None:
            query_proj = query_proj + self.normalize_bias
        operands = (query_proj, self.linear_k(zero_uncounted_rows(memory, masking)), None)
        v = normalised(self.linear_att, self.normalize_scalar)
        context, weights = attend_concat(*operands, v.to(query_proj.dtype), memory, masking)
        if is_turned:
            context, weights = context.transpose(0, 1), weights.transpose(0, 1)
        return context, weights
