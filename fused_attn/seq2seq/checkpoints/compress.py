"""Store the parameters of exported models in float16 or int8.

float16 halves the size of a model. int8 quarters it: each row of a matrix is stored as
``round(127 w / m)``, m being the largest |w| of the row, together with the scale m / 127. No weight
is off by more than m / 254. Vectors (biases) stay as they are. In either case the loaded model
computes in float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

STORED_TYPES = ("float32", "float16", "int8")

_SCALE = ".int8-scale"  # no parameter's name contains it


def narrowed(parameters: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Return the tensors to store; ``kind`` is one of `STORED_TYPES`."""
    if kind != "int8":
        return {name: tensor.to(getattr(torch, kind)) for name, tensor in parameters.items()}
    stored: dict[str, Tensor] = {}
    for name, tensor in parameters.items():
        stored[name] = tensor
        if tensor.ndim < 2:
            continue
        whole = tensor.float()
        scale = whole.flatten(1).abs().amax(1) / 127
        rows = scale.clamp_min(torch.finfo(torch.float32).tiny).view(-1, *[1] * (tensor.ndim - 1))
        stored[name] = (whole / rows).round().clamp(-127, 127).to(torch.int8)
        stored[name + _SCALE] = scale
    return stored


def widened(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters of stored tensors: int8 matrices become float32, the rest is unchanged.

    Raises KeyError if the scale of an int8 matrix is missing, ValueError if it has the wrong shape.
    """
    parameters: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if tensor.dtype == torch.int8:
            scale = stored[name + _SCALE]
            if scale.shape != tensor.shape[:1]:
                shapes = f"{tuple(scale.shape)}, expected {tuple(tensor.shape[:1])}"
                raise ValueError(f"{name + _SCALE} has shape {shapes}")
            parameters[name] = tensor.float() * scale.view(-1, *[1] * (tensor.ndim - 1))
        elif not name.endswith(_SCALE):
            parameters[name] = tensor
    return parameters
