"""Decompositions, for exported graphs that must run without our operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fused_attn import composites, ops

assert ops  # imported because it defines the operators


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Our forward operators as ATen operators, to pass to `ExportedProgram.run_decompositions`.

    `torch.onnx.export` does not need this: under it, modules call only ATen operators.
    """
    return {
        torch.ops.fused_attn.dot_attention.default: composites.dot_attention,
        torch.ops.fused_attn.concat_attention.default: composites.concat_attention,
        torch.ops.fused_attn.concat_scores.default: composites.concat_scores,
    }
