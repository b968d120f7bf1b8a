"""Fused Luong attention for PyTorch, and an RNN sequence-to-sequence toolkit built on it.

Public names are imported on first use: ``import fused_attn`` is cheap, and the command line answers
``--help`` without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fused_attn.attention import LuongAttention
    from fused_attn.composed import coverage_loss, sparsemax
    from fused_attn.decoder import LuongDecoder
    from fused_attn.decoder_parts import DecoderOutput, DecoderState, GreedyOutput
    from fused_attn.functional import concat_attention, dot_attention, general_attention
    from fused_attn.prepared import PreparedMemory
    from fused_attn.reference import LocalWindow
    from fused_attn.scores import concat_scores, dot_scores, general_scores

_HOME = {
    "DecoderOutput": "fused_attn.decoder_parts",
    "DecoderState": "fused_attn.decoder_parts",
    "GreedyOutput": "fused_attn.decoder_parts",
    "LocalWindow": "fused_attn.reference",
    "LuongAttention": "fused_attn.attention",
    "LuongDecoder": "fused_attn.decoder",
    "PreparedMemory": "fused_attn.prepared",
    "concat_attention": "fused_attn.functional",
    "concat_scores": "fused_attn.scores",
    "coverage_loss": "fused_attn.composed",
    "dot_attention": "fused_attn.functional",
    "dot_scores": "fused_attn.scores",
    "general_attention": "fused_attn.functional",
    "general_scores": "fused_attn.scores",
    "sparsemax": "fused_attn.composed",
}

__all__ = [
    "DecoderOutput",
    "DecoderState",
    "GreedyOutput",
    "LocalWindow",
    "LuongAttention",
    "LuongDecoder",
    "PreparedMemory",
    "__version__",
    "concat_attention",
    "concat_scores",
    "coverage_loss",
    "dot_attention",
    "dot_scores",
    "general_attention",
    "general_scores",
    "sparsemax",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fused_attn' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # later accesses find it there
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
