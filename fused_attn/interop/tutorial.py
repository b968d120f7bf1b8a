"""PyTorch's chatbot tutorial: `Attn`, the most widely copied "Luong attention"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_attn.checks import autocast, check_masking, check_memory, check_query
from fused_attn.functional import concat_attention, dot_attention, general_attention
from fused_attn.interop.adapter import Adapter, attend_keys, attend_scores, both
from fused_attn.modules import beside_forward, readable_weight
from fused_attn.reference import zero_uncounted_rows


class TutorialAttn(Adapter):
    """Attn(method, hidden_size) of the chatbot tutorial: returns only weights, and takes no mask.

    forward(hidden (1, B, H), encoder_outputs (S, B, H)) returns weights (B, 1, S). The bias of
    "general" adds ``h_t . b`` to all scores of a row, which cancels in the softmax: it is kept as a
    parameter, and gets no gradient. `attend` also returns the context, for which the tutorial uses
    bmm, and takes lengths.
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
        return self._attend(hidden, encoder_outputs, None)[1]

    @beside_forward
    def attend(
        self, hidden: Tensor, encoder_outputs: Tensor, memory_lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the context (B, 1, H) and the weights (B, 1, S); memory_lengths is int (B,)."""
        return self._attend(hidden, encoder_outputs, memory_lengths)

    def _attend(
        self, hidden: Tensor, encoder_outputs: Tensor, memory_lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        query, memory = hidden.transpose(0, 1), encoder_outputs.transpose(0, 1)
        rest: dict[str, Any] = {"memory_lengths": memory_lengths, "return_weights": True}
        if self.method == "dot":
            return both(dot_attention(query, memory, **rest))
        weight = readable_weight(self.attn)
        if weight is None:
            return self._attend_called(query, memory, memory_lengths)
        if self.method == "general":
            return both(general_attention(query, memory, weight, **rest))
        on_query, on_memory = weight.split(self.hidden_size, dim=1)
        parameters = (on_query, on_memory, self.v, self.attn.bias)
        return both(concat_attention(query, memory, *parameters, **rest))

    def _attend_called(
        self, query: Tensor, memory: Tensor, memory_lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Attention with an ``attn`` whose weight cannot be read: it is called as in the peer."""
        query, memory = autocast(query, memory)
        check_memory(memory)
        check_query(query, memory, "hidden_size", self.hidden_size)
        masking = check_masking(query, memory, memory_lengths, None, None, 0.0)
        states = zero_uncounted_rows(memory, masking).transpose(0, 1)
        if self.method == "general":
            energy = self.attn(states).transpose(0, 1)
            return attend_keys(query, energy, memory, 1.0, masking)
        batch, queries, width = query.shape
        rows = states.repeat_interleave(queries, dim=1)
        asked = query.reshape(1, batch * queries, width).expand_as(rows)
        energy = torch.tanh(self.attn(torch.cat((asked, rows), dim=2)))
        found = (energy @ self.v).reshape(memory.shape[1], batch, queries).permute(1, 2, 0)
        return attend_scores(found, memory, masking, is_step=False)
