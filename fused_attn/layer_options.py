"""Checks of the options of `LuongAttention` and `LuongDecoder`, with error messages."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fused_attn import checks
from fused_attn.choices import LAYER_SCORES, LOCALS
from fused_attn.prepared import PreparedMemory


def check_size(name: str, size: object) -> int:
    """Return a size as an int; ValueError if it is not a positive integer."""
    number = checks.integer(size)
    if number is None or number < 1:
        raise ValueError(f"{name} must be a positive int, got {size!r}")
    return number


def check_optional_size(name: str, size: object) -> int | None:
    return None if size is None else check_size(name, size)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    """Return a value; ValueError if it is not one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def check_score(
    score: str, query_dim: int, memory_dim: int, attn_dim: object, bias: bool, max_source: object
) -> None:
    check_choice("score", score, LAYER_SCORES)
    if score == "dot" and query_dim != memory_dim:
        raise ValueError(
            f"score 'dot' requires query_dim == memory_dim, got {query_dim} and {memory_dim}"
        )
    if attn_dim is not None and score != "concat":
        raise ValueError(
            f"attn_dim must be None unless score='concat', got {attn_dim} with score={score!r}"
        )
    if bias and score == "dot":
        raise ValueError("bias must be False for score 'dot' (no query projection), got bias=True")
    if (max_source is None) == (score == "location"):
        expected = "the maximum source length" if score == "location" else "None"
        raise ValueError(f"max_source must be {expected} for score {score!r}, got {max_source!r}")


def check_output_bias(output_bias: bool, output_dim: int | None) -> None:
    if output_bias and output_dim is None:
        raise ValueError(
            "output_bias must be False if output_dim is None (no output layer), "
            f"got output_bias={output_bias!r}"
        )


def check_scale(scale: object) -> float | None:
    """Return the scale as a float, or None if it is learned."""
    if isinstance(scale, str) and scale == "learned":
        return None
    return checks.number("scale", scale, "a number or 'learned'")


def check_local(local: object, window: Any) -> Any:
    """Return the window: as a float if ``local`` is used, unchanged otherwise."""
    if local is None:
        return window
    if local not in LOCALS:
        names = ", ".join(map(repr, LOCALS))
        raise ValueError(f"local must be None or one of {names}, got {local!r}")
    half_width = checks.number("window", window)
    if not 0 < half_width < float("inf"):
        raise ValueError(f"window must be positive and finite, got {window!r}")
    return half_width


def check_concat_parts(
    score: str, parts: dict[str, bool], conv_channels: object, conv_width: object
) -> tuple[int, int]:
    """Return (conv_channels, conv_width). ``parts`` has the boolean options of concat by name."""
    for name, value in (*parts.items(), ("conv_channels", conv_channels)):
        if value and score != "concat":
            raise ValueError(
                f"{name} requires score='concat', got {name}={value!r} with score={score!r}"
            )
    channels, width = checks.integer(conv_channels), checks.integer(conv_width)
    if channels is None or channels < 0:
        raise ValueError(f"conv_channels must be a non-negative int, got {conv_channels!r}")
    if width is None or width < 1 or width % 2 == 0:
        raise ValueError(f"conv_width must be a positive odd int, got {conv_width!r}")
    return channels, width


def check_prepared(
    layer: Any, memory: PreparedMemory, memory_lengths: object, memory_mask: object
) -> None:
    """Raise if memory was prepared for another layer, or if lengths or a mask are given with it."""
    if memory_lengths is not None or memory_mask is not None:
        raise ValueError(
            "memory_lengths and memory_mask must be None if memory is a PreparedMemory: pass them "
            "to prepare_memory"
        )
    if memory.score != layer.score:
        raise ValueError(
            f"memory was prepared for the score {memory.score!r}, expected {layer.score!r}"
        )
    if memory.memory_proj is not None and memory.memory_proj.shape[2] != layer.attn_dim:
        raise ValueError(
            f"memory was prepared for attn_dim {memory.memory_proj.shape[2]}, "
            f"expected {layer.attn_dim}"
        )


def describe(layer: Any) -> str:
    """The layer's `extra_repr`: sizes, score, and the options that are not the default."""
    parts = [f"{layer.query_dim}, {layer.memory_dim}, score={layer.score!r}"]
    if isinstance(layer.scale, Tensor):
        parts.append("scale='learned'")
    elif layer.scale != 1.0:
        parts.append(f"scale={layer.scale:g}")
    if layer.local is not None:
        parts.append(f"local={layer.local!r}, window={layer.window:g}")
    if layer.g is not None:
        parts.append("weight_norm=True")
    if layer.layer_norm:
        parts.append("layer_norm=True")
    if layer.normalizer != "softmax":
        parts.append(f"normalizer={layer.normalizer!r}")
    if layer.dropout:
        parts.append(f"dropout={layer.dropout:g}")
    if layer.backend != "auto":
        parts.append(f"backend={layer.backend!r}")
    return ", ".join(parts)
