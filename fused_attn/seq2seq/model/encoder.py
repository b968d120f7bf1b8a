"""The encoder, which reads the source into the memory, and the bridge to the decoder."""

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
        """Encode a batch of sources.

        embedded: (B, S, embedding), padded at the end. lengths: int64 (B,), 1..S, in any order.
        on_host: the lengths on the CPU.

        Returns the memory (B, S, E), 0 in the padding, and the final states of all layers, each
        (layers, B, E). With ``reverse_source`` (Sutskever et al. 2014) the source is read from its
        end, but the memory is in source order.
        """
        order = reversed_order(lengths, embedded.shape[1]) if self.reverse else None
        if order is not None:
            embedded = embedded.take_along_dim(order[..., None], dim=1)
        if len(on_host) and int(on_host.min()) == embedded.shape[1]:
            memory, final = self.stack(embedded)  # packing would take a quarter more time
        else:
            packed = pack_padded_sequence(embedded, on_host, True, enforce_sorted=False)
            states, final = self.stack(packed)
            memory, _ = pad_packed_sequence(states, True, total_length=embedded.shape[1])
        if order is not None:
            memory = memory.take_along_dim(order[..., None], dim=1)
        return memory, final


def reversed_order(lengths: Tensor, source: int) -> Tensor:
    """Return indices int64 (B, S) that reverse each row within its length and keep the padding."""
    positions = torch.arange(source, device=lengths.device)
    reversed_positions = lengths[:, None] - 1 - positions
    return torch.where(reversed_positions >= 0, reversed_positions, positions)


class Bridge(nn.Module):
    """The initial decoder state from the encoder, each tensor (layers, B, hidden).

    ``config.bridge`` is one of:
        "zero": zeros.
        "last": the final states of the encoder.
        "dense": tanh of a linear map of the final states. The layers share the map.
        "mean": tanh of a linear map of the mean of the memory (Cho et al. 2014), the same for each
            layer.
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
        # The decoder takes the topmost encoder layers. If it has more layers than the encoder, its
        # lower ones all take the lowest encoder layer.
        rows = range(len(final[0]) - self.layers, len(final[0]))
        chosen = [t[[max(row, 0) for row in rows]] for t in final]
        if self.kind == "last":
            return tuple(chosen)
        return tuple(torch.tanh(m(t)) for m, t in zip(self.maps, chosen, strict=True))
