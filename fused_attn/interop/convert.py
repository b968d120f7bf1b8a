"""Conversion of weights between adapters and `LuongAttention`.

Peers apply the matrix of the general score to the query (as we do) or to the memory (then its
transpose is ours). Their output layers take [context; query] (like the paper and us) or
[query; context]. An output layer that is not ``tanh(W [context; query])`` is not converted: then
the `LuongAttention` returns the context.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fused_attn import modules
from fused_attn.attention import LuongAttention
from fused_attn.interop.fairseq import FairseqAttentionLayer
from fused_attn.interop.gnmt import GNMTBahdanauAttention
from fused_attn.interop.joeynmt import JoeyBahdanauAttention, JoeyLuongAttention
from fused_attn.interop.opennmt import OpenNMTGlobalAttention
from fused_attn.interop.speechbrain import ContentBasedAttention, LocationAwareAttention
from fused_attn.interop.tensorflow import TFABahdanauAttention, TFALuongAttention
from fused_attn.interop.tutorial import TutorialAttn

# Pairs of the name of our parameter and the peer's tensor, as a view that can be written to.
Pairs = list[tuple[str, Tensor]]


def swap_output_order(weight: Tensor, first: int) -> Tensor:
    """Reorder the columns [a; b] of an output layer's weight to [b; a].

    This converts between [query; context] (JoeyNMT, TensorFlow Addons, the chatbot tutorial,
    ParlAI) and [context; query] (the paper, OpenNMT-py, fairseq, SpeechBrain).

    weight: (output_dim, width of a + width of b). first: the width of a. Returns a new tensor of
    the same shape. Raises ValueError if ``first`` is not between 0 and the number of columns.
    """
    if weight.dim() != 2 or not 0 < first < weight.shape[1]:
        raise ValueError(
            "first must be between 0 and the number of columns of weight, which has shape "
            f"{tuple(weight.shape)}, got {first}"
        )
    return torch.cat((weight[:, first:], weight[:, :first]), dim=1)


def _opennmt(layer: Any) -> tuple[dict[str, Any], Pairs]:
    kind, dim = layer.attn_type, layer.dim
    options: dict[str, Any] = {"query_dim": dim, "normalizer": layer.attn_func}
    if kind == "mlp":
        pairs = [
            ("query_proj.weight", layer.linear_query.weight),
            ("query_proj.bias", layer.linear_query.bias),
            ("memory_proj.weight", layer.linear_context.weight),
            ("v", layer.v.weight[0]),
        ]
        return options | {"score": "concat", "bias": True}, pairs
    pairs = [("output_proj.weight", layer.linear_out.weight)]
    if kind == "general":
        pairs.append(("query_proj.weight", layer.linear_in.weight))
    return options | {"score": kind, "output_dim": dim}, pairs


def _joey_bahdanau(layer: Any) -> tuple[dict[str, Any], Pairs]:
    options = {
        "query_dim": layer.query_layer.in_features,
        "memory_dim": layer.key_layer.in_features,
        "score": "concat",
        "attn_dim": layer.key_layer.out_features,
    }
    return options, [
        ("query_proj.weight", layer.query_layer.weight),
        ("memory_proj.weight", layer.key_layer.weight),
        ("v", layer.energy_layer.weight[0]),
    ]


def _joey_luong(layer: Any) -> tuple[dict[str, Any], Pairs]:
    keys = layer.key_layer
    options = {"query_dim": keys.out_features, "memory_dim": keys.in_features}
    return options, [("query_proj.weight", keys.weight.T)]


def _fairseq(layer: Any) -> tuple[dict[str, Any], Pairs]:
    bias = layer.output_proj.bias is not None  # of both layers: one option sets them
    options = {
        "query_dim": layer.input_proj.in_features,
        "memory_dim": layer.input_proj.out_features,
        "output_dim": layer.output_proj.out_features,
        "bias": bias,
        "output_bias": bias,
    }
    pairs = [
        ("query_proj.weight", layer.input_proj.weight),
        ("output_proj.weight", layer.output_proj.weight),
    ]
    if bias:
        pairs += [
            ("query_proj.bias", layer.input_proj.bias),
            ("output_proj.bias", layer.output_proj.bias),
        ]
    return options, pairs


def _gnmt(layer: Any) -> tuple[dict[str, Any], Pairs]:
    options = {
        "query_dim": layer.linear_q.in_features,
        "memory_dim": layer.linear_k.in_features,
        "score": "concat",
        "attn_dim": layer.num_units,
        "weight_norm": layer.normalize,
        "bias": layer.normalize,
    }
    pairs = [
        ("query_proj.weight", layer.linear_q.weight),
        ("memory_proj.weight", layer.linear_k.weight),
        ("v", layer.linear_att),
    ]
    if layer.normalize:
        pairs += [("g", layer.normalize_scalar[0]), ("query_proj.bias", layer.normalize_bias)]
    return options, pairs


def _tutorial(layer: Any) -> tuple[dict[str, Any], Pairs]:
    size = layer.hidden_size
    options = {"query_dim": size, "score": layer.method}
    if layer.method == "dot":
        return options, []
    if layer.method == "general":  # its bias cancels in the softmax
        return options, [("query_proj.weight", layer.attn.weight.T)]
    return options | {"bias": True}, [
        ("query_proj.weight", layer.attn.weight[:, :size]),
        ("memory_proj.weight", layer.attn.weight[:, size:]),
        ("query_proj.bias", layer.attn.bias),
        ("v", layer.v),
    ]


def _speechbrain(layer: Any) -> tuple[dict[str, Any], Pairs]:
    options = {
        "query_dim": layer.mlp_dec.in_features,
        "memory_dim": layer.mlp_enc.in_features,
        "score": "concat",
        "attn_dim": layer.mlp_enc.out_features,
        "scale": float(layer.scaling),
        "bias": True,
    }
    # All biases are added inside the tanh: `to_luong` adds the others to the query's.
    pairs = [
        ("query_proj.weight", layer.mlp_dec.weight),
        ("query_proj.bias", layer.mlp_dec.bias),
        ("memory_proj.weight", layer.mlp_enc.weight),
        ("v", layer.mlp_attn.weight[0]),
    ]
    if isinstance(layer, LocationAwareAttention):
        conv = layer.conv_loc
        options |= {"conv_channels": conv.out_channels, "conv_width": conv.kernel_size[0]}
        pairs += [("history.conv.weight", conv.weight)]
        pairs += [("history.conv_proj.weight", layer.mlp_loc.weight)]
    return options, pairs


def _tfa_luong(layer: Any) -> tuple[dict[str, Any], Pairs]:
    dense = _built(layer.memory_layer)
    options = {"query_dim": layer.units, "memory_dim": dense.in_features}
    pairs = [("query_proj.weight", dense.weight.T)]
    if layer.attention_g is None:
        return options, pairs
    return options | {"scale": "learned"}, [*pairs, ("scale", layer.attention_g)]


def _tfa_bahdanau(layer: Any) -> tuple[dict[str, Any], Pairs]:
    queries, keys = _built(layer.query_layer), _built(layer.memory_layer)
    normalize = layer.attention_g is not None
    options = {
        "query_dim": queries.in_features,
        "memory_dim": keys.in_features,
        "score": "concat",
        "attn_dim": layer.units,
        "weight_norm": normalize,
        "bias": normalize,
    }
    pairs = [
        ("query_proj.weight", queries.weight),
        ("memory_proj.weight", keys.weight),
        ("v", layer.attention_v),
    ]
    if normalize:
        pairs += [("g", layer.attention_g), ("query_proj.bias", layer.attention_b)]
    return options, pairs


def _built(dense: nn.Module) -> Any:
    if isinstance(dense, nn.LazyLinear):
        raise ValueError("the layer has not been given a memory yet, so its widths are not known")
    return dense


_READERS: dict[type[nn.Module], Callable[[Any], tuple[dict[str, Any], Pairs]]] = {
    OpenNMTGlobalAttention: _opennmt,
    JoeyBahdanauAttention: _joey_bahdanau,
    JoeyLuongAttention: _joey_luong,
    FairseqAttentionLayer: _fairseq,
    GNMTBahdanauAttention: _gnmt,
    TutorialAttn: _tutorial,
    ContentBasedAttention: _speechbrain,
    TFALuongAttention: _tfa_luong,
    TFABahdanauAttention: _tfa_bahdanau,
}


def read(layer: nn.Module) -> tuple[dict[str, Any], Pairs]:
    """The options of the `LuongAttention` like an adapter, and the tensors of its parameters."""
    for kind, reader in _READERS.items():
        if isinstance(layer, kind):
            _check_plain("layer", layer)
            return reader(layer)
    known = ", ".join(kind.__name__ for kind in _READERS)
    raise TypeError(f"layer must be one of {known}, got {type(layer).__name__}")


def _check_plain(name: str, layer: nn.Module) -> None:
    if reason := modules.read_only(layer):
        raise ValueError(
            f"{name} must have plain parameters, but {reason}. Remove or merge that first"
        )


def _other_biases(layer: nn.Module) -> list[Tensor]:
    """The biases of ``layer`` that are added to the query's bias."""
    if not isinstance(layer, ContentBasedAttention):
        return []
    biases: list[Tensor] = [layer.mlp_enc.bias]
    if isinstance(layer, LocationAwareAttention):
        biases.append(layer.mlp_loc.bias)
    return biases


def to_luong(layer: nn.Module) -> LuongAttention:
    """Return a `LuongAttention` with copies of an adapter's weights, on its device and dtype.

    Its results equal those of the adapter's attention, up to the layout and order of the results.
    The output layer is included if it is ``tanh(W [context; query])``. ``layer`` must be an
    adapter; `swap` makes one from another toolkit's layer. Raises TypeError for any other layer,
    and ValueError if its weights cannot be converted.
    """
    options, pairs = read(layer)
    sample = next(layer.parameters(), torch.empty(0))
    luong = LuongAttention(**options, device=sample.device, dtype=sample.dtype)
    ours = dict(luong.named_parameters())
    with torch.no_grad():
        for name, theirs in pairs:
            ours[name].copy_(theirs)
        for bias in _other_biases(layer):
            ours["query_proj.bias"].add_(bias)
    return luong.train(layer.training)


def load_luong(layer: nn.Module, luong: LuongAttention) -> None:
    """Copy the weights of a `LuongAttention` into an adapter with the same score and sizes.

    The inverse of `to_luong`. Parameters of the adapter outside its attention do not change. Raises
    TypeError if ``layer`` is not an adapter, and ValueError if the options of ``luong`` do not
    match ``layer``; nothing changes then.
    """
    options, pairs = read(layer)
    _check_plain("luong", luong)
    for name, value in options.items():
        got = "learned" if name == "scale" and isinstance(luong.scale, Tensor) else None
        got = _option(luong, name) if got is None else got
        if got != value:
            raise ValueError(f"luong must have {name}={value!r} to match the layer, got {got!r}")
    ours = dict(luong.named_parameters())
    if without := sorted(ours.keys() - {name for name, _ in pairs}):
        raise ValueError(
            f"luong must have only parameters that the layer has, got {', '.join(without)} as well"
        )
    with torch.no_grad():
        for name, theirs in pairs:
            theirs.copy_(ours[name])
        for bias in _other_biases(layer):
            bias.zero_()


def _option(luong: LuongAttention, name: str) -> Any:
    history = luong.history
    special: dict[str, Callable[[], Any]] = {
        "bias": lambda: luong.query_proj.bias is not None,
        "output_bias": lambda: luong.output_dim is not None and luong.output_proj.bias is not None,
        "weight_norm": lambda: luong.g is not None,
        "conv_channels": lambda: history.channels if history else 0,
        "conv_width": lambda: history.conv.kernel_size[0] if history else 0,
    }
    return special[name]() if name in special else getattr(luong, name)
