"""Parameters in fewer bytes than they are used in: for models that are kept and sent, not trained.

float16 halves a model. int8 quarters it: of each row of a matrix the numbers ``round(127 w / m)``
with m the largest of its |w|, and m / 127, so that no weight is off by more than m / 254. Vectors
(biases) stay as they are. Either way a model computes in float32 again once it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

STORED_TYPES = ("float32", "float16", "int8")

_SCALE = ".int8-scale"  # in no parameter's name


def narrowed(parameters: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Return the parameters as they are stored: ``kind`` is float32, float16 or int8."""
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
    """Return the parameters that `narrowed` has stored, or those of any other checkpoint.

    Raises KeyError if the scale of an int8 matrix is missing, ValueError if it is of another size.
    """
    parameters: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if tensor.dtype == torch.int8:
            scale = stored[name + _SCALE]
            if scale.shape != tensor.shape[:1]:
                shapes = f"{tuple(scale.shape)}, for rows {tuple(tensor.shape)}"
                raise ValueError(f"{name + _SCALE} has shape {shapes}")
            parameters[name] = tensor.float() * scale.view(-1, *[1] * (tensor.ndim - 1))
        elif not name.endswith(_SCALE):
            parameters[name] = tensor
    return parameters
