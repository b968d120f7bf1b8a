"""A `LuongDecoder` as its tensors, for code that runs it without its modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from fused_attn import modules
from fused_attn.attention import LuongAttention
from fused_attn.layer_parts import AlignmentHistory, PredictedPosition
from fused_attn.recurrent import CELLS, RecurrentStack, weights_of

# The modules whose computation `spec` describes; a subclass may compute something else.
_KNOWN = (
    *(nn.Embedding, nn.Linear, nn.ModuleList, *CELLS.values()),
    *(LuongAttention, RecurrentStack, AlignmentHistory, PredictedPosition),
)


def spec(decoder: Any) -> dict[str, Any]:
    """Return the tensors of a decoder, detached and without copies, and its options.

    ``cell``, ``residual``, ``input_feeding``; ``layers``, a list of (weight_ih, weight_hh, bias_ih,
    bias_hh); ``embedding`` (V, input_size); ``output_proj``; ``output_weight`` and ``output_bias``;
    ``attention``, see `_attention`. A missing tensor is None. Raises ValueError with all of
    `not_described`, if there are any.
    """
    if reasons := not_described(decoder):
        raise ValueError(f"the decoder cannot be described by its tensors: {'; '.join(reasons)}")
    output, stack = decoder.output_layer, decoder.recurrent
    return {
        "cell": stack.cell,
        "residual": stack.residual,
        "layers": [_of_cell(cell) for cell in stack.layers],
        "input_feeding": decoder.input_feeding,
        "embedding": _weight(decoder.embedding),
        "output_weight": _weight(output),
        "output_bias": None if output is None else _detached(output.bias),
        "output_proj": _weight(decoder.output_proj),
        "attention": None if decoder.attention is None else _attention(decoder.attention),
    }


def _attention(layer: LuongAttention) -> dict[str, Any]:
    """The tensors of the attention. ``v`` has the gain and the scale in it."""
    is_concat = layer.score == "concat"
    query = getattr(layer, "query_proj", None)
    position, history = layer.position, layer.history
    output = layer.output_proj if layer.output_dim is not None else None
    return {
        "score": layer.score,
        "query_weight": _weight(query),
        "query_bias": None if query is None else _detached(query.bias),
        "memory_weight": layer.memory_proj.weight.detach() if is_concat else None,
        "v": layer._vector().detach() if is_concat else None,
        "scale": 1.0 if is_concat else float(layer.scale),
        "coverage_weight": None if history is None else history.coverage_proj.weight[:, 0].detach(),
        "local": layer.local,
        "window": float(layer.window),
        "position_weight": None if position is None else position.proj.weight.detach(),
        "position_v": None if position is None else position.v.detach(),
        "combine_weight": _weight(output),
        "combine_bias": None if output is None else _detached(output.bias),
    }


def not_described(decoder: Any) -> list[str]:
    """The reasons why a decoder computes something other than what its tensors say."""
    reasons = []
    if nn_module._has_any_global_hook():
        reasons.append("there are global module hooks")
    for path, part in decoder.named_modules():
        if part is not decoder and (reason := _objection(part)):
            reasons.append(f"{path} {reason}")
    kinds = {(p.device.type, str(p.dtype).removeprefix("torch.")) for p in decoder.parameters()}
    if kinds - {("cpu", "float32")}:
        told = ", ".join(f"{dtype} on {device}" for device, dtype in sorted(kinds))
        reasons.append(f"the parameters must be float32 on cpu, got {told}")
    if decoder.training:
        rates = {name: getattr(decoder, name) for name in ("dropout", "input_dropout")}
        reasons += [f"{name}={rate:g} in training mode" for name, rate in rates.items() if rate]
    embedding = decoder.embedding
    if embedding is not None and embedding.max_norm is not None:
        reasons.append("embedding has max_norm, which changes its weight at each call")
    return reasons + ([] if decoder.attention is None else _of_attention(decoder.attention))


def _of_attention(layer: LuongAttention) -> list[str]:
    reasons = []
    if layer.layer_norm:
        reasons.append("attention has layer_norm=True")
    if layer.normalizer != "softmax":
        reasons.append(f"attention has normalizer={layer.normalizer!r}")
    if layer.history is not None and layer.history.channels:
        reasons.append(f"attention has conv_channels={layer.history.channels}")
    if layer.training and layer.dropout:
        reasons.append(f"attention has dropout={layer.dropout:g} in training mode")
    if layer.backend not in ("auto", "cpu"):
        reasons.append(f"attention has backend={layer.backend!r}")
    return reasons


def _objection(part: nn.Module) -> str | None:
    """Why the tensors of a part do not say what it computes, or None if they do."""
    if isinstance(part, nn.Conv1d | nn.LayerNorm) or type(part).__name__ == "NormedLinear":
        return None  # named by their options
    if hooks := modules.hooks_of(part):
        return f"has hooks ({', '.join(hooks)})"
    if type(part) not in _KNOWN:
        return f"is a {type(part).__name__}"
    if isinstance(part, nn.RNNCell) and part.nonlinearity != "tanh":
        return f"has nonlinearity={part.nonlinearity!r}"
    for name, parameter in part.named_parameters(recurse=False):
        if type(parameter) not in (Tensor, nn.Parameter):
            return f"has a {type(parameter).__name__} as its {name}"
    return None


def _of_cell(cell: nn.Module) -> tuple[Tensor | None, ...]:
    weights = [weight.detach() for weight in weights_of(cell)]
    return (*weights, *[None] * (4 - len(weights)))


def _weight(part: Any) -> Tensor | None:
    return None if part is None else _detached(part.weight)


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
