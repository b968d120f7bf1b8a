"""A stack of recurrent layers with dropout and residual connections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fused_attn.recurrent import has_bfloat16_lstm
from fused_attn.seq2seq.config import ModelConfig
from fused_attn.seq2seq.model.one_step import one_step

# State of a stack: (h,), or (h, c) for an LSTM, each (layers, N, width).
Hidden = tuple[Tensor, ...]

CELLS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


def dropout(x: Tensor, probability: float) -> Tensor:
    """Return x with dropout: elements are zeroed at random, and the rest scaled by 1 / (1 - p)."""
    if not x.is_cpu:
        return nn.functional.dropout(x, probability)
    # One draw of 64 bits serves four elements. Torch's own dropout draws one number per element. On
    # a CPU that takes four times as long, a tenth of a training step (DESIGN).
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    bits = draws.view(torch.int16)[: x.numel()].view(x.shape)
    keep = bits >= min(round(probability * 2**16) - 2**15, 2**15 - 1)
    return x * keep.to(x.dtype).div_(1.0 - probability)


class Dropout(nn.Module):
    """Dropout for a tensor (N, T, width) or a packed sequence.

    ``variational`` uses one mask (N, width) for all steps of a sequence (Gal & Ghahramani 2016).
    """

    def __init__(self, probability: float, variational: bool) -> None:
        super().__init__()
        self.probability = probability
        self.variational = variational

    def extra_repr(self) -> str:
        return f"{self.probability:g}" + (", variational" if self.variational else "")

    def forward(self, x: Tensor | PackedSequence) -> Tensor | PackedSequence:
        if not self.training or self.probability == 0.0:
            return x
        if isinstance(x, Tensor):
            if not self.variational:
                return dropout(x, self.probability)
            return x * nn.functional.dropout(
                x.new_ones(x.shape[0], 1, x.shape[2]), self.probability
            )
        if not self.variational:
            return x._replace(data=dropout(x.data, self.probability))
        sequences = int(x.batch_sizes[0])
        mask = nn.functional.dropout(x.data.new_ones(sequences, x.data.shape[1]), self.probability)
        # Packed data is grouped by step; within each step the longest sequence comes first.
        rows = torch.cat([torch.arange(size) for size in x.batch_sizes.tolist()])
        return x._replace(data=x.data * mask[rows.to(x.data.device)])


class Stack(nn.Module):
    """Recurrent layers, batch first.

    Args:
        config: its cell, residual, dropout and variational are used. A residual connection adds the
            input of a layer to its output where their widths agree (He et al. 2016). Dropout is
            applied between layers.
        input_size: width of the first layer's input.
        hidden: width of each layer and direction.
        layers: number of layers.
        bidirectional: whether each layer also reads the sequence from its end.
    """

    def __init__(
        self,
        config: ModelConfig,
        input_size: int,
        hidden: int,
        layers: int,
        *,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        self.hidden = hidden
        self.input_size = input_size
        self.width = hidden * (2 if bidirectional else 1)
        self.residual = config.residual
        widths = [input_size, *[self.width] * (layers - 1)]
        self.layers = nn.ModuleList(
            CELLS[config.cell](width, hidden, batch_first=True, bidirectional=bidirectional)
            for width in widths
        )
        self.dropout = Dropout(config.dropout, config.variational)

    def forward(
        self, x: Tensor | PackedSequence, state: Hidden | None = None
    ) -> tuple[Tensor | PackedSequence, Hidden]:
        """Run all layers over a batch.

        x: (N, T, input_size) or packed. state: initial state, each tensor (layers, N, hidden); None
        means zeros.

        Returns the outputs of the last layer, (N, T, width) or packed, and the state after the last
        step, each tensor (layers, N, width) with both directions concatenated.

        Under CPU autocast the layers run in float32 if torch has no bfloat16 LSTM for this CPU.
        """
        if x.data.is_cpu and torch.is_autocast_enabled("cpu") and not has_bfloat16_lstm():
            with torch.autocast("cpu", enabled=False):
                return self._run(_whole(x), state and tuple(t.float() for t in state))
        return self._run(x, state)

    def _run(
        self, x: Tensor | PackedSequence, state: Hidden | None
    ) -> tuple[Tensor | PackedSequence, Hidden]:
        finals: list[Sequence[Tensor]] = []
        for number, layer in enumerate(self.layers):
            x = self.dropout(x) if number else x
            before = None if state is None else tuple(t[number : number + 1] for t in state)
            y, final = _layer(layer, x, before)
            if self.residual and _width(x) == _width(y):
                y = y._replace(data=y.data + x.data) if isinstance(y, PackedSequence) else y + x
            x = y
            finals.append([t.transpose(0, 1).flatten(1) for t in final])
        return x, tuple(torch.stack(tensors) for tensors in zip(*finals, strict=True))


def _layer(
    layer: nn.Module, x: Tensor | PackedSequence, state: Hidden | None
) -> tuple[Any, Hidden]:
    """Call a layer, or take one step of it. state: as for the layer, but (h,) in place of h."""
    if isinstance(x, Tensor) and (step := one_step(layer, x, state)) is not None:
        return step
    before = state and tuple(tensor.contiguous() for tensor in state)
    y, final = layer(x, before[0] if before and len(before) == 1 else before)
    return y, final if isinstance(final, tuple) else (final,)


def _whole(x: Tensor | PackedSequence) -> Tensor | PackedSequence:
    return x._replace(data=x.data.float()) if isinstance(x, PackedSequence) else x.float()


def _width(x: Tensor | PackedSequence) -> int:
    return (x.data if isinstance(x, PackedSequence) else x).shape[-1]
