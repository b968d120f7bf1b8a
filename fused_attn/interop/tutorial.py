"""PyTorch's chatbot tutorial: `Attn`, the most copied "Luong attention"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_attn.functional import concat_attention, dot_attention, general_attention
from fused_attn.interop.adapter import Adapter


class TutorialAttn(Adapter):
    """Attn(method, hidden_size) of the chatbot tutorial: weights only, and no mask.

    forward(hidden (1, B, H), encoder_outputs (S, B, H)) returns weights (B, 1, S). The bias of
    "general" adds ``h_t . b`` to every score of a row, which the softmax takes out again: it is
    kept as a parameter, and has no gradient. `attend` gives the context too, which the tutorial
    makes by a bmm, and takes lengths.
    """

    peer = "PyTorch chatbot tutorial Attn"
    peer_class = "Attn"
    signatures = (("hidden", "encoder_outputs"),)

    def __init__(self, method: str, hidden_size: int) -> None:
        super().__init__()
        if method not in ("dot", "general", "concat"):
            raise ValueError(f"method must be 'dot', 'general' or 'concat', got {method!r}")
        self.method = method
        self.hidden_size = hidden_size
        if method == "general":
            self.attn = nn.Linear(hidden_size, hidden_size)
        elif method == "concat":
            self.attn = nn.Linear(2 * hidden_size, hidden_size)
            # The peer leaves it uninitialised.
            self.v = nn.Parameter(torch.empty(hidden_size).uniform_(-1, 1) / hidden_size**0.5)

    @classmethod
    def options_of(cls, layer: Any) -> dict[str, Any]:
        return {"method": layer.method, "hidden_size": layer.hidden_size}

    def forward(self, hidden: Tensor, encoder_outputs: Tensor) -> Tensor:
        return self.attend(hidden, encoder_outputs)[1]

    def attend(
        self, hidden: Tensor, encoder_outputs: Tensor, memory_lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Context (B, 1, H) and weights (B, 1, S)."""
        query, memory = hidden.transpose(0, 1), encoder_outputs.transpose(0, 1)
        rest: dict[str, Any] = {"memory_lengths": memory_lengths, "return_weights": True}
        if self.method == "dot":
            context, weights = dot_attention(query, memory, **rest)
        elif self.method == "general":
            context, weights = general_attention(query, memory, self.attn.weight, **rest)
        else:
            on_query, on_memory = self.attn.weight.split(self.hidden_size, dim=1)
            parameters = (on_query, on_memory, self.v, self.attn.bias)
            context, weights = concat_attention(query, memory, *parameters, **rest)
        assert weights is not None
        return context, weights
