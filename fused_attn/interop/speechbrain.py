"""SpeechBrain: `ContentBasedAttention` and `LocationAwareAttention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_attn.interop.adapter import Adapter, attend_energy
from fused_attn.layer_parts import convolve
from fused_attn.prepared import exponentials
from fused_attn.reference import Masking, zero_uncounted_rows


class ContentBasedAttention(Adapter):
    """speechbrain.nnet.attention.ContentBasedAttention: concat score, then a linear layer.

    Call reset() before a batch, then forward(enc_states (B, S, E), enc_len (B,) in frames,
    dec_states (B, D)) at every step, which returns the output (B, output_dim) and the weights
    (B, S). As in SpeechBrain, the first step after reset() projects the memory, and later steps
    reuse the projection.
    """

    peer = "SpeechBrain ContentBasedAttention"
    peer_class = "ContentBasedAttention"
    signatures = (("enc_states", "enc_len", "dec_states"),)

    def __init__(
        self, enc_dim: int, dec_dim: int, attn_dim: int, output_dim: int, scaling: float = 1.0
    ) -> None:
        super().__init__()
        self.mlp_enc = nn.Linear(enc_dim, attn_dim)
        self.mlp_dec = nn.Linear(dec_dim, attn_dim)
        self.mlp_attn = nn.Linear(attn_dim, 1, bias=False)
        self.mlp_out = nn.Linear(enc_dim, output_dim)
        self.scaling = scaling
        self.reset()

    @classmethod
    def options_of(cls, layer: Any) -> dict[str, Any]:
        return {
            "enc_dim": layer.mlp_enc.in_features,
            "dec_dim": layer.mlp_dec.in_features,
            "attn_dim": layer.mlp_enc.out_features,
            "output_dim": layer.mlp_out.out_features,
            "scaling": layer.scaling,
        }

    def reset(self) -> None:
        """Clear the stored projection of the memory."""
        self.precomputed_enc_h: Tensor | None = None
        self._lengths: Tensor | None = None
        self._exponentials: Tensor | None = None

    def _prepare(self, enc_states: Tensor, enc_len: Tensor) -> Tensor:
        if self.precomputed_enc_h is None:
            # The peer attends to positions below the length, which may be a float.
            self._lengths = torch.ceil(enc_len).to(enc_states.device, torch.int64)
            clean = zero_uncounted_rows(enc_states, Masking(self._lengths))
            self.precomputed_enc_h = self.mlp_enc(clean)
            self._exponentials = exponentials(self.precomputed_enc_h)
        return self.precomputed_enc_h

    def _attend(
        self, memory_proj: Tensor, exps: Tensor | None, enc_states: Tensor, dec_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        operands = (self.mlp_dec(dec_states), memory_proj, exps, self.mlp_attn, self.scaling)
        context, weights = attend_energy(*operands, enc_states, Masking(self._lengths))
        return self.mlp_out(context), weights

    def forward(
        self, enc_states: Tensor, enc_len: Tensor, dec_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        memory_proj = self._prepare(enc_states, enc_len)
        return self._attend(memory_proj, self._exponentials, enc_states, dec_states)


class LocationAwareAttention(ContentBasedAttention):
    """speechbrain.nnet.attention.LocationAwareAttention: adds a convolution of the last weights.

    Used like `ContentBasedAttention`. The first step after reset() convolves uniform weights. The
    location term is added to the projection of the memory, so no tensor is larger than that. The
    weights that a step passes to the next carry no gradient, as in SpeechBrain.
    """

    peer = "SpeechBrain LocationAwareAttention"
    peer_class = "LocationAwareAttention"

    def __init__(
        self,
        enc_dim: int,
        dec_dim: int,
        attn_dim: int,
        output_dim: int,
        conv_channels: int,
        kernel_size: int,
        scaling: float = 1.0,
    ) -> None:
        super().__init__(enc_dim, dec_dim, attn_dim, output_dim, scaling)
        width = 2 * kernel_size + 1
        self.conv_loc = nn.Conv1d(1, conv_channels, width, padding=kernel_size, bias=False)
        self.mlp_loc = nn.Linear(conv_channels, attn_dim)

    @classmethod
    def options_of(cls, layer: Any) -> dict[str, Any]:
        conv = layer.conv_loc
        sizes = {"conv_channels": conv.out_channels, "kernel_size": conv.padding[0]}
        return super().options_of(layer) | sizes

    def reset(self) -> None:
        super().reset()
        self.prev_attn: Tensor | None = None

    def forward(
        self, enc_states: Tensor, enc_len: Tensor, dec_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        memory_proj = self._prepare(enc_states, enc_len)
        if self.prev_attn is None:
            lengths = self._lengths
            assert lengths is not None
            inside = torch.arange(enc_states.shape[1], device=lengths.device) < lengths[:, None]
            self.prev_attn = inside / lengths.clamp(min=1)[:, None].to(enc_states.dtype)
        seen = convolve(self.conv_loc, self.prev_attn.to(memory_proj.dtype))
        term = self.mlp_loc(seen.mT)
        output, weights = self._attend(memory_proj + term, None, enc_states, dec_states)
        self.prev_attn = weights.detach()
        return output, weights
