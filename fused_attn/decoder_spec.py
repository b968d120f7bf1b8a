"""A `LuongDecoder` as its tensors, for the native decoder."""

from __future__ import annotations

from typing import Any

from fused_attn import packed
from fused_attn.recurrent import RecurrentStack


def spec(decoder: Any) -> dict[str, Any]:
    """Return the tensors of a decoder, detached and without copies, and its options.

    A missing tensor is None. See `packed`. Raises ValueError with all of `not_described`, if there
    are any.
    """
    if reasons := not_described(decoder):
        raise ValueError(f"the decoder cannot be described by its tensors: {'; '.join(reasons)}")
    output, stack, attention = decoder.output_layer, decoder.recurrent, decoder.attention
    return {
        "cell": stack.cell,
        "residual": stack.residual,
        "layers": [packed.layer_spec(cell) for cell in stack.layers],
        "input_feeding": decoder.input_feeding,
        "embedding": packed.weight_of(decoder.embedding),
        "output_weight": packed.weight_of(output),
        "output_bias": None if output is None else packed.detached(output.bias),
        "output_proj": packed.weight_of(decoder.output_proj),
        "attention": None if attention is None else packed.attention_spec(attention),
    }


def not_described(decoder: Any) -> list[str]:
    """Return why a decoder computes something other than what its tensors say."""
    reasons = packed.module_reasons(decoder, (RecurrentStack,))
    if decoder.training:
        rates = {name: getattr(decoder, name) for name in ("dropout", "input_dropout")}
        reasons += [f"{name}={rate:g} in training mode" for name, rate in rates.items() if rate]
    attention = decoder.attention
    return reasons if attention is None else [*reasons, *packed.attention_reasons(attention)]
