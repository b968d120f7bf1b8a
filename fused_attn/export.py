"""For graphs that hold our operators and go where these are not known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fused_attn import composites, ops

assert ops  # it defines the operators


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Our forward operators in terms of ATen's, as `ExportedProgram.run_decompositions` takes them.

    `torch.onnx.export` of a module needs none of this: it meets ATen operators only.
    """
    return {
        torch.ops.fused_attn.dot_attention.default: composites.dot_attention,
        torch.ops.fused_attn.concat_attention.default: composites.concat_attention,
        torch.ops.fused_attn.concat_scores.default: composites.concat_scores,
    }
