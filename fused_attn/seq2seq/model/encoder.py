"""From source symbols to the memory, and to the state that the decoder starts with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fused_attn.seq2seq.config import ModelConfig
from fused_attn.seq2seq.model.recurrent import Hidden, Stack


class Encoder(nn.Module):
    """Recurrent layers over an embedded source."""

    def __init__(self, config: ModelConfig, stack: Stack) -> None:
        super().__init__()
        self.stack = stack
        self.reverse = config.reverse_source

    def forward(self, embedded: Tensor, lengths: Tensor, on_host: Tensor) -> tuple[Tensor, Hidden]:
        """embedded: (B, S, width), padded at the end. lengths: int64 (B,), 1..S, in any order.
        on_host: the same on the CPU.

        Returns the memory (B, S, E), 0 in the padding, and the last states of every layer. A source
        that is read reversed (Sutskever et al. 2014) leaves its memory in the order of the source.
        """
        order = reversed_order(lengths, embedded.shape[1]) if self.reverse else None
        if order is not None:
            embedded = embedded.take_along_dim(order[..., None], dim=1)
        if len(on_host) and int(on_host.min()) == embedded.shape[1]:
            memory, final = self.stack(embedded)  # packing costs a quarter more time
        else:
            packed = pack_padded_sequence(embedded, on_host, True, enforce_sorted=False)
            states, final = self.stack(packed)
            memory, _ = pad_packed_sequence(states, True, total_length=embedded.shape[1])
        if order is not None:
            memory = memory.take_along_dim(order[..., None], dim=1)
        return memory, final


def reversed_order(lengths: Tensor, source: int) -> Tensor:
    """Positions (B, S) that turn each row around within its length; padding stays in place."""
    positions = torch.arange(source, device=lengths.device)
    turned = lengths[:, None] - 1 - positions
    return torch.where(turned >= 0, turned, positions)


class Bridge(nn.Module):
    """The decoder's first state, (layers, B, hidden) each, from what the encoder leaves.

    "zero"; "last", the encoder's last states as they are; "dense", tanh of a linear map of them,
    which the layers share; "mean", tanh of a linear map of the mean of the memory (Cho et al. 2014;
    the same for each layer).
    """

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.kind = config.bridge
        self.layers = config.layers
        self.hidden = config.hidden
        self.parts = 2 if config.cell == "lstm" else 1
        if self.kind in ("dense", "mean"):
            self.maps = nn.ModuleList(nn.Linear(width, config.hidden) for _ in range(self.parts))

    def forward(self, memory: Tensor, lengths: Tensor, final: Hidden) -> Hidden:
        if self.kind == "zero":
            shape = (self.layers, memory.shape[0], self.hidden)
            return tuple(memory.new_zeros(shape) for _ in range(self.parts))
        if self.kind == "mean":
            mean = memory.sum(dim=1) / lengths.clamp(min=1)[:, None].to(memory.dtype)
            return tuple(torch.tanh(m(mean)).repeat(self.layers, 1, 1) for m in self.maps)
        # The decoder's layers take the topmost of the encoder's; a lowest serves all above it.
        rows = range(len(final[0]) - self.layers, len(final[0]))
        chosen = [t[[max(row, 0) for row in rows]] for t in final]
        if self.kind == "last":
            return tuple(chosen)
        return tuple(torch.tanh(m(t)) for m, t in zip(self.maps, chosen, strict=True))
