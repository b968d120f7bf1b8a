"""Recurrent layers one above the other, with dropout and residual connections between them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fused_attn.seq2seq.config import ModelConfig

# Of a stack: (h,), or (h, c) of an LSTM, each (layers, N, width).
Hidden = tuple[Tensor, ...]

CELLS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


@cache
def _has_bfloat16_lstm() -> bool:
    """Whether this processor has the LSTM that torch calls under CPU autocast: oneDNN's."""
    if not torch.backends.mkldnn.is_available():
        return True  # torch's own, of any processor
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def dropout(x: Tensor, probability: float) -> Tensor:
    """Return x, a share of it set to 0 and the rest scaled so that the mean stays."""
    if not x.is_cpu:
        return nn.functional.dropout(x, probability)
    # A draw of 64 bits serves four elements. Torch's own dropout draws for each of them: on a CPU
    # it takes four times as long, a tenth of a training step (DESIGN).
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    bits = draws.view(torch.int16)[: x.numel()].view(x.shape)
    keep = bits >= min(round(probability * 2**16) - 2**15, 2**15 - 1)
    return x * keep.to(x.dtype).div_(1.0 - probability)


class Dropout(nn.Module):
    """Dropout of (N, T, width) or of a packed sequence.

    ``variational`` (Gal & Ghahramani 2016) drops the same columns at every step of a sequence.
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
        # Of the steps that lie one after another, each begins again at the longest sequence.
        rows = torch.cat([torch.arange(size) for size in x.batch_sizes.tolist()])
        return x._replace(data=x.data * mask[rows.to(x.data.device)])


class Stack(nn.Module):
    """Recurrent layers, batch first.

    Args:
        config: cell ("rnn" is the tanh one), residual, dropout and variational. A residual adds a
            layer's input to its output where they are equally wide (He et al. 2016); dropout is
            between the layers.
        input_size: width of the first layer's input.
        hidden: width of each layer, and of each direction.
        layers: how many.
        bidirectional: whether each layer also reads from the end.
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
        """x: (N, T, input_size) or packed. state: (layers, N, hidden) each; 0 if None.

        Returns the last layer's states (N, T, width) or packed, and the state behind the last step,
        of which each tensor is (layers, N, width): both directions side by side.

        Under CPU autocast the layers stay in float32 where torch has no LSTM in bfloat16.
        """
        if x.data.is_cpu and torch.is_autocast_enabled("cpu") and not _has_bfloat16_lstm():
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
            if before is not None and len(before) == 1:
                y, final = layer(x, before[0].contiguous())
            else:
                y, final = layer(x, before and tuple(t.contiguous() for t in before))
            if self.residual and _width(x) == _width(y):
                y = y._replace(data=y.data + x.data) if isinstance(y, PackedSequence) else y + x
            x = y
            tensors = final if isinstance(final, tuple) else (final,)
            finals.append([t.transpose(0, 1).flatten(1) for t in tensors])
        return x, tuple(torch.stack(tensors) for tensors in zip(*finals, strict=True))


def _whole(x: Tensor | PackedSequence) -> Tensor | PackedSequence:
    return x._replace(data=x.data.float()) if isinstance(x, PackedSequence) else x.float()


def _width(x: Tensor | PackedSequence) -> int:
    return (x.data if isinstance(x, PackedSequence) else x).shape[-1]
