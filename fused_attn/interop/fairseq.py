"""fairseq: the `AttentionLayer` of the LSTM model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_attn.functional import dot_attention
from fused_attn.interop.adapter import Adapter, both


class FairseqAttentionLayer(Adapter):
    """fairseq.models.lstm.AttentionLayer: general score, then ``tanh(W [context; query])``.

    forward(input (B, D), source_hids (S, B, E), encoder_padding_mask (S, B) with True = ignore, or
    None) returns the state (B, output_embed_dim) and the weights (S, B).
    """

    peer = "fairseq AttentionLayer"
    peer_class = "AttentionLayer"
    signatures = (("input", "source_hids", "encoder_padding_mask"),)

    def __init__(
        self,
        input_embed_dim: int,
        source_embed_dim: int,
        output_embed_dim: int,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.input_proj = nn.Linear(input_embed_dim, source_embed_dim, bias=bias)
        widths = (input_embed_dim + source_embed_dim, output_embed_dim)
        self.output_proj = nn.Linear(*widths, bias=bias)

    @classmethod
    def options_of(cls, layer: Any) -> dict[str, Any]:
        return {
            "input_embed_dim": layer.input_proj.in_features,
            "source_embed_dim": layer.input_proj.out_features,
            "output_embed_dim": layer.output_proj.out_features,
            "bias": layer.input_proj.bias is not None,
        }

    def forward(
        self, input: Tensor, source_hids: Tensor, encoder_padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        memory = source_hids.transpose(0, 1)  # strided, not copied
        mask = None if encoder_padding_mask is None else ~encoder_padding_mask.bool().t()
        query = self.input_proj(input)
        context, weights = both(dot_attention(query, memory, memory_mask=mask, return_weights=True))
        state = self.output_proj(torch.cat((context, input), dim=1))
        return torch.tanh(state), weights.t()
