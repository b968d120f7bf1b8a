"""One step of a recurrent layer on a CPU, as `nn.LSTMCell`, `nn.GRUCell` and `nn.RNNCell` do it.

A call of `nn.LSTM` for a single step is slow on a CPU: oneDNN converts the weights to its own
layout on every call, which takes several times as long as the step. For the other cells the call
for a sequence costs some overhead only. Several steps are still faster in one call, from about four
steps up.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fused_attn.modules import readable_tensors

_STEPS: dict[type[nn.Module], Callable[..., Any]] = {
    nn.LSTM: torch.lstm_cell,
    nn.GRU: torch.gru_cell,
    nn.RNN: torch.rnn_tanh_cell,
}
_NAMES = [
    [f"{name}{direction}" for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")]
    for direction in ("", "_reverse")
]


def one_step(
    layer: nn.Module, x: Tensor, state: tuple[Tensor, ...] | None
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """Run a recurrent layer for one step, with the results of ``layer(x, state)``.

    layer: an `nn.LSTM`, `nn.GRU` or tanh `nn.RNN`, batch first, with one layer.
    x: (N, 1, width). state: (h,) or (h, c), each (directions, N, hidden); None means zeros.

    Returns the output, (N, 1, hidden x directions), and the state after the step. Returns None if
    the layer must be called instead: for several steps, on another device than a CPU, while a graph
    is traced, or if it has hooks or anything else than plain parameters.
    """
    if x.dim() != 3 or not x.is_cpu or torch.compiler.is_compiling() or torch._C._is_tracing():
        return None
    if x.shape[1] != 1 or not (weights := _weights(layer)):
        return None
    step, is_lstm = _STEPS[type(layer)], isinstance(layer, nn.LSTM)
    parts = 2 if is_lstm else 1
    if state is None:
        zeros = x.new_zeros(len(weights), x.shape[0], weights[0][1].shape[1])
        state = (zeros,) * parts
    if any(tensor.dim() != 3 or tensor.shape[0] != len(weights) for tensor in state):
        return None  # the layer names what is wrong
    found = []
    for number, own in enumerate(weights):
        before = tuple(tensor[number] for tensor in state)
        after = step(x[:, 0], before if is_lstm else before[0], *own)
        found.append(after if is_lstm else (after,))
    if is_lstm and torch.is_autocast_enabled("cpu"):
        found = [tuple(map(_lowered, after)) for after in found]
    output = torch.cat([after[0] for after in found], dim=1) if len(found) > 1 else found[0][0]
    return output[:, None], tuple(map(torch.stack, zip(*found, strict=True)))


def _weights(layer: Any) -> list[list[Tensor]]:
    """The tensors that a step reads, for each direction; [] if the layer must be called."""
    kind = type(layer)
    if kind not in _STEPS or not (layer.batch_first and layer.bias) or layer.num_layers != 1:
        return []
    if layer.proj_size or (kind is nn.RNN and layer.nonlinearity != "tanh"):
        return []
    directions = _NAMES if layer.bidirectional else _NAMES[:1]
    tensors = readable_tensors(layer, kind, list(chain(*directions)))
    return [tensors[start : start + 4] for start in range(0, len(tensors), 4)]


def _lowered(tensor: Tensor) -> Tensor:
    """The dtype that `nn.LSTM` returns under autocast, whatever the dtype of its state."""
    lower = torch.get_autocast_dtype("cpu")
    return tensor.to(lower) if tensor.dtype == torch.float32 else tensor
