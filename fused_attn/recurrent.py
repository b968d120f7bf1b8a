"""The recurrent layers of `LuongDecoder`: LSTM, GRU or tanh RNN, with residual connections."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.modules import module as nn_module

from fused_attn import modules

# The state of the layers: (h,), or (h, c) for an LSTM, each (layers, N, hidden).
Hidden = tuple[Tensor, ...]

CELLS: dict[str, Any] = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}
# All steps of one layer in one call.
_SEQUENCES: dict[str, Any] = {"lstm": torch.lstm, "gru": torch.gru, "rnn": torch.rnn_tanh}


@cache
def has_bfloat16_lstm() -> bool:
    """Whether this CPU supports the bfloat16 LSTM of oneDNN, which torch uses under autocast."""
    if not torch.backends.mkldnn.is_available():
        return True  # torch then uses its own LSTM, which runs on any CPU
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _readable_weights(cell: Any, kind: type[nn.Module]) -> list[Tensor]:
    """The weights and biases of a cell that need not be called; [] if it must be called."""
    if type(cell) is not kind or getattr(cell, "nonlinearity", "tanh") != "tanh":
        return []
    # A FLOP counter sets such a hook; it has no formula for oneDNN's LSTM of a sequence.
    if nn_module._has_any_global_hook():
        return []
    biases = ["bias_ih", "bias_hh"] if cell.bias else []
    return modules.readable_tensors(cell, kind, ["weight_ih", "weight_hh", *biases])


def _in_one_piece(weights: list[Tensor]) -> list[Tensor]:
    """Copies of the weights that follow one another in memory, as cuDNN wants them."""
    flat = torch.cat([weight.flatten() for weight in weights])
    pieces = flat.split([weight.numel() for weight in weights])
    return [piece.view_as(weight) for piece, weight in zip(pieces, weights, strict=True)]


class RecurrentStack(nn.Module):
    """Recurrent layers, batch first.

    Args:
        cell: "lstm", "gru" or "rnn" (tanh).
        input_size: width of the first layer's input.
        hidden: width of each layer.
        layers: number of layers.
        bias: whether the layers have biases.
        residual: adds the input of a layer to its output where their widths agree (He et al. 2016).
        dropout: probability of dropping an element between two layers in training mode.
        where: device and dtype of the parameters.

    Parameters: those of torch's cells, ``layers.0.weight_ih`` (4 hidden, input_size) and so on.
    """

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden: int,
        layers: int,
        *,
        bias: bool = True,
        residual: bool = False,
        dropout: float = 0.0,
        **where: Any,
    ) -> None:
        super().__init__()
        self.cell = cell
        self.hidden = hidden
        self.residual = residual
        self.dropout = dropout
        self.layers = nn.ModuleList(
            CELLS[cell](width, hidden, bias=bias, **where)
            for width in [input_size, *[hidden] * (layers - 1)]
        )

    @property
    def tensors(self) -> int:
        """How many tensors the state has: 2 for an LSTM, 1 otherwise."""
        return 2 if self.cell == "lstm" else 1

    def forward(self, x: Tensor, state: Hidden) -> tuple[Tensor, Hidden]:
        """Run all layers over T steps.

        x: (N, T, input_size). state: each tensor (layers, N, hidden).

        Returns the outputs of the last layer, (N, T, hidden), and the state after the last step.
        """
        if x.shape[1] == 0:
            return x.new_zeros(x.shape[0], 0, self.hidden), state
        finals = []
        for number, cell in enumerate(self.layers):
            if number and self.training and self.dropout:
                x = dropout(x, self.dropout)
            y, final = self._run(cell, x, tuple(tensor[number] for tensor in state))
            x = y + x if self.residual and x.shape[-1] == y.shape[-1] else y
            finals.append(final)
        return x, tuple(torch.stack(tensors) for tensors in zip(*finals, strict=True))

    def _run(self, cell: Any, x: Tensor, state: Hidden) -> tuple[Tensor, Hidden]:
        """Run one layer; the tensors of its state are (N, hidden)."""
        # A compiler can trace the steps of a cell, but not torch's call for a sequence. On a CPU,
        # that call takes several times as long as the cell for one step of an LSTM: oneDNN first
        # rearranges the weights.
        is_sequence = x.shape[1] > 1 and not torch.compiler.is_compiling()
        if is_sequence and (weights := _readable_weights(cell, CELLS[self.cell])):
            if x.is_cpu and torch.is_autocast_enabled("cpu") and not has_bfloat16_lstm():
                with torch.autocast("cpu", enabled=False):
                    return self._sequence(weights, x.float(), tuple(t.float() for t in state))
            return self._sequence(weights, x, state)
        outputs = []
        for inputs in x.unbind(1):
            after = cell(inputs, state if self.cell == "lstm" else state[0])
            state = after if self.cell == "lstm" else (after,)
            outputs.append(state[0])
        return torch.stack(outputs, dim=1), state

    def _sequence(self, weights: list[Tensor], x: Tensor, state: Hidden) -> tuple[Tensor, Hidden]:
        before = tuple(tensor[None].contiguous() for tensor in state)
        if x.is_cuda:
            weights = _in_one_piece(weights)
        has_biases, options = len(weights) == 4, (1, 0.0, self.training, False, True)
        y, *final = _SEQUENCES[self.cell](
            x, before if self.cell == "lstm" else before[0], weights, has_biases, *options
        )
        return y, tuple(tensor[0] for tensor in final)

    def extra_repr(self) -> str:
        return "residual=True" if self.residual else ""
