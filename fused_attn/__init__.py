"""Fused Luong attention for PyTorch, and the RNN sequence-to-sequence toolkit built on it.

The public names are loaded on first use, so that ``import fused_attn`` costs nothing and the
command line can answer ``--help`` without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fused_attn.attention import LuongAttention, PreparedMemory
    from fused_attn.functional import concat_attention, dot_attention, general_attention

_HOME = {
    "LuongAttention": "fused_attn.attention",
    "PreparedMemory": "fused_attn.attention",
    "concat_attention": "fused_attn.functional",
    "dot_attention": "fused_attn.functional",
    "general_attention": "fused_attn.functional",
}

__all__ = [
    "LuongAttention",
    "PreparedMemory",
    "__version__",
    "concat_attention",
    "dot_attention",
    "general_attention",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fused_attn' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # the next access no longer comes here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
