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

CELLS: dict[str, Any] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


@cache
def _has_bfloat16_lstm() -> bool:
    """Whether this CPU supports the bfloat16 LSTM of oneDNN, which torch uses under autocast."""
    if not torch.backends.mkldnn.is_available():
        return True  # torch then uses its own LSTM, which runs on any CPU
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def weights_of(layer: nn.RNNBase) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """weight_ih, weight_hh, bias_ih and bias_hh of a layer; the biases are None without a bias."""
    biases = (layer.bias_ih_l0, layer.bias_hh_l0) if layer.bias else (None, None)
    return (layer.weight_ih_l0, layer.weight_hh_l0, *biases)


def is_plain(layer: nn.Module) -> bool:
    """Whether the weights of a recurrent layer may be used without calling the layer."""
    is_known = type(layer) in CELLS.values() and getattr(layer, "num_layers", 0) == 1
    return is_known and not modules.hooks_of(layer) and not nn_module._has_any_global_hook()


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

    Parameters: those of torch's layers, ``layers.0.weight_ih_l0`` and so on.
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
            CELLS[cell](width, hidden, bias=bias, batch_first=True, **where)
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
        for number, layer in enumerate(self.layers):
            if number and self.training and self.dropout:
                x = dropout(x, self.dropout)
            y, final = self._run(layer, x, tuple(tensor[number] for tensor in state))
            x = y + x if self.residual and x.shape[-1] == y.shape[-1] else y
            finals.append(final)
        return x, tuple(torch.stack(tensors) for tensors in zip(*finals, strict=True))

    def _run(self, layer: Any, x: Tensor, state: Hidden) -> tuple[Tensor, Hidden]:
        """Run one layer; the tensors of its state are (N, hidden)."""
        if x.shape[1] == 1 and is_plain(layer):
            # On a CPU oneDNN rearranges the weights at every call, which takes ten times as long
            # as the step itself.
            return self._step(layer, x, state)
        if x.is_cpu and torch.is_autocast_enabled("cpu") and not _has_bfloat16_lstm():
            with torch.autocast("cpu", enabled=False):
                return self._call(layer, x.float(), tuple(tensor.float() for tensor in state))
        return self._call(layer, x, state)

    def _step(self, layer: Any, x: Tensor, state: Hidden) -> tuple[Tensor, Hidden]:
        inputs, weights = x[:, 0], weights_of(layer)
        if self.cell == "lstm":
            h, c = torch.lstm_cell(inputs, state, *weights)
            return h[:, None], (h, c)
        run = torch.gru_cell if self.cell == "gru" else torch.rnn_tanh_cell
        h = run(inputs, state[0], *weights)
        return h[:, None], (h,)

    def _call(self, layer: Any, x: Tensor, state: Hidden) -> tuple[Tensor, Hidden]:
        before = tuple(tensor[None].contiguous() for tensor in state)
        y, final = layer(x, before if self.cell == "lstm" else before[0])
        tensors = final if isinstance(final, tuple) else (final,)
        return y, tuple(tensor[0] for tensor in tensors)

    def extra_repr(self) -> str:
        return "residual=True" if self.residual else ""
