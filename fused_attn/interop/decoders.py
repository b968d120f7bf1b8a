"""Conversion of other toolkits' recurrent decoders to `LuongDecoder`.

The decoders are those of OpenNMT-py (`InputFeedRNNDecoder`, `StdRNNDecoder`), JoeyNMT
(`RecurrentDecoder`) and fairseq (`LSTMDecoder`). They are recognised by the names of their classes
and attributes; no other toolkit is imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_attn.decoder import LuongDecoder
from fused_attn.decoder_parts import DecoderState
from fused_attn.interop.adapter import Adapter
from fused_attn.interop.convert import Pairs, read, swap_output_order
from fused_attn.interop.swap import find
from fused_attn.modules import read_only


class _Reading(NamedTuple):
    """What a peer's decoder is as a `LuongDecoder`."""

    options: dict[str, Any]  # of the decoder
    pairs: Pairs  # our parameters, and the peer's tensors
    reasons: list[str]  # why it is not one


def to_luong_decoder(
    decoder: nn.Module, *, embedding: nn.Module | None = None, generator: nn.Module | None = None
) -> LuongDecoder:
    """Return a `LuongDecoder` with copies of the weights of another toolkit's decoder.

    decoder: an `InputFeedRNNDecoder` or `StdRNNDecoder` of OpenNMT-py, a `RecurrentDecoder` of
        JoeyNMT, or an `LSTMDecoder` of fairseq.
    embedding: JoeyNMT only: the embedding of the target, ``model.trg_embed``. Without it the result
        takes embedded symbols. The other decoders have their own.
    generator: OpenNMT-py only: the output layer, ``model.generator``. Without it the result has no
        output layer. The other decoders have their own.

    From the same state and memory, the result has the attentional states, logits and weights of
    ``decoder``. See `initial_state` for the first state. A memory row without positions gives the
    context 0, where the peers give NaN. In evaluation mode a dropout that `LuongDecoder` lacks is
    left out, and then so are all others; in training mode it is refused.

    Raises TypeError if ``decoder`` is none of these, and ValueError with all reasons if it has
    options or parts that a `LuongDecoder` cannot express.
    """
    reader = _READERS.get(type(decoder).__name__)
    if reader is None:
        known = ", ".join(_READERS)
        raise TypeError(f"decoder must be one of {known}, got {type(decoder).__name__}")
    for name, part in (("decoder", decoder), ("embedding", embedding), ("generator", generator)):
        if part is not None and (reason := read_only(part)):
            raise ValueError(
                f"{name} must have plain parameters, but {reason}. Remove or merge that first"
            )
    try:
        options, pairs, reasons = reader(decoder, embedding, generator)
    except AttributeError as error:
        raise TypeError(
            f"decoder is not the {type(decoder).__name__} of a known toolkit: {error}"
        ) from error
    if reasons:
        told = "; ".join(reasons)
        raise ValueError(f"the {type(decoder).__name__} cannot be converted: {told}")
    sample = next(decoder.parameters())
    luong = LuongDecoder(**options, device=sample.device, dtype=sample.dtype)
    ours = dict(luong.named_parameters())
    with torch.no_grad():
        for name, theirs in pairs:
            ours[name].copy_(theirs)
    return luong.train(decoder.training)


def _attention(layer: Any, reasons: list[str]) -> tuple[dict[str, Any], Pairs]:
    """The options and weights of the attention of a decoder."""
    adapter = layer
    if not isinstance(layer, Adapter):
        kind, reason = find(layer)
        if kind is None:
            reasons.append(f"its attention is not known ({reason or type(layer).__name__})")
            return {}, []
        adapter = kind.adopt(layer)
    options, pairs = read(adapter)
    return options, [(f"attention.{name}", tensor) for name, tensor in pairs]


def _layers(layers: list[tuple[Any, str]]) -> Pairs:
    """The weights of recurrent layers: for each the module, and the ending of its names."""
    return [
        (f"recurrent.layers.{number}.{name}", getattr(module, name + ending))
        for number, (module, ending) in enumerate(layers)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        if getattr(module, "bias", True) or name.startswith("weight")
    ]


def _embedding(table: Any, scale: float = 1.0) -> tuple[nn.Embedding, Pairs]:
    """A new embedding with the options of ``table``, and its weights."""
    weight = table.weight.detach()
    options = {"padding_idx": table.padding_idx, "sparse": table.sparse}
    ours = nn.Embedding(
        weight.shape[0], weight.shape[1], **options, device=weight.device, dtype=weight.dtype
    )
    return ours, [("embedding.weight", weight if scale == 1.0 else weight * scale)]


def _dropouts(
    decoder: nn.Module, reading: _Reading, given: dict[str, float], not_ours: str
) -> None:
    """Set the dropouts of the options, unless the decoder has a dropout that is not one of ours."""
    if not not_ours:
        reading.options.update(given)
    elif decoder.training:
        reading.reasons.append(f"{not_ours}: call decoder.eval() to convert it for inference")


def _opennmt(decoder: Any, embedding: Any, generator: Any) -> _Reading:
    feeds = type(decoder).__name__ == "InputFeedRNNDecoder"
    options: dict[str, Any] = {"hidden": decoder.hidden_size, "input_feeding": feeds}
    reading = _Reading(options, [], [])
    reasons = reading.reasons
    if embedding is not None:
        reasons.append("embedding must be None, because the decoder has its own")
    if decoder.context_gate is not None:
        reasons.append("it has context_gate, a gate between context and state")
    if decoder._coverage:
        reasons.append("it has coverage_attn, whose coverage is not a term of the score")
    copies = getattr(decoder, "copy_attn", None) is not None or getattr(decoder, "_copy", False)
    if copies or getattr(decoder, "_reuse_copy_attn", False):
        reasons.append("it has copy_attn, a second attention that copies source symbols")
    _opennmt_rnn(decoder, reading)
    if decoder.attn is not None:
        _opennmt_attention(decoder.attn, reading)
    table = _opennmt_embedding(decoder.embeddings, reasons)
    if table is not None:
        options["input_size"] = table.embedding_dim
        options["embedding"], pairs = _embedding(table)
        reading.pairs.extend(pairs)
        _opennmt_generator(generator, table, reading)
    return reading


def _opennmt_rnn(decoder: Any, reading: _Reading) -> None:
    rnn, options = decoder.rnn, reading.options
    cells = {nn.LSTM: "lstm", nn.GRU: "gru", nn.LSTMCell: "lstm", nn.GRUCell: "gru"}
    first = rnn.layers[0] if options["input_feeding"] else rnn
    if type(first) not in cells:  # SRU, or RNN, whose state OpenNMT-py itself does not accept
        reading.reasons.append(f"it has rnn_type {type(first).__name__}")
        return
    options |= {"cell": cells[type(first)], "layers": decoder.num_layers, "bias": first.bias}
    if options["input_feeding"]:
        reading.pairs.extend(_layers([(cell, "") for cell in rnn.layers]))
        between = rnn.dropout.p
    else:
        reading.pairs.extend(_layers([(rnn, f"_l{number}") for number in range(rnn.num_layers)]))
        between = rnn.dropout
    rate, embedded = decoder.dropout.p, getattr(decoder.embeddings, "dropout_p", 0.0)
    differ = decoder.num_layers > 1 and between != rate
    not_ours = f"its dropout is {rate:g} after and {between:g} between the layers" if differ else ""
    inputs = decoder.embeddings.dropout.p if embedded else 0.0
    _dropouts(decoder, reading, {"dropout": rate, "input_dropout": inputs}, not_ours)


def _opennmt_attention(layer: Any, reading: _Reading) -> None:
    if layer.attn_type == "mlp":
        reading.reasons.append("it has attn_type='mlp', whose output layer has no tanh")
    options, pairs = _attention(layer, reading.reasons)
    reading.options["attention"] = options
    reading.pairs.extend(pairs)


def _opennmt_embedding(embeddings: Any, reasons: list[str]) -> Any:
    """The table of the words, or None if the embeddings are more than that."""
    tables, *others = embeddings.make_embedding
    if len(tables) > 1:
        reasons.append(f"its embeddings have features ({len(tables) - 1})")
    if any("Positional" in type(other).__name__ for other in others):
        reasons.append("its embeddings have position_encoding")
    return tables[0] if len(tables) == 1 and not others else None


def _opennmt_generator(generator: Any, table: Any, reading: _Reading) -> None:
    if generator is None:
        return
    linear, *others = generator if isinstance(generator, nn.Sequential) else [generator]
    names = [type(other).__name__ for other in others]
    if type(linear) is not nn.Linear or not {"Cast", "LogSoftmax"}.issuperset(names):
        kind = ", ".join([type(linear).__name__, *names])
        reading.reasons.append(f"generator must be a linear layer and a log-softmax, got {kind}")
        return
    _output(linear, table, reading)


def _output(linear: Any, table: Any, reading: _Reading) -> None:
    """The output layer, tied if its weight is that of the embedding ``table``."""
    has_bias = linear.bias is not None
    reading.options.update(vocab_size=linear.out_features, output_bias=has_bias)
    if table is not None and linear.weight is table.weight:
        reading.options["tie_embedding"] = True
    else:
        reading.pairs.append(("output_layer.weight", linear.weight))
    if has_bias:
        reading.pairs.append(("output_layer.bias", linear.bias))


def _joeynmt(decoder: Any, embedding: Any, generator: Any) -> _Reading:
    rnn, hidden, feeds = decoder.rnn, decoder.hidden_size, bool(decoder.input_feeding)
    options: dict[str, Any] = {
        **{"input_size": decoder.emb_size, "hidden": hidden, "layers": decoder.num_layers},
        **{"cell": "lstm" if type(rnn) is nn.LSTM else "gru", "bias": rnn.bias},
        "input_feeding": feeds,
    }
    reading = _Reading(options, _layers([(rnn, f"_l{n}") for n in range(rnn.num_layers)]), [])
    if type(rnn) not in (nn.LSTM, nn.GRU):
        reading.reasons.append(f"it has rnn_type {type(rnn).__name__}")
    if generator is not None:
        reading.reasons.append("generator must be None, because the decoder has its own")
    if getattr(decoder, "activation", torch.tanh) is not torch.tanh:
        reading.reasons.append("its activation is not tanh")
    attention, pairs = _attention(decoder.attention, reading.reasons)
    layer = decoder.att_vector_layer
    options["attention"] = attention | {"output_dim": layer.out_features, "output_bias": True}
    reading.pairs.extend(pairs)
    reading.pairs.append(("attention.output_proj.weight", swap_output_order(layer.weight, hidden)))
    reading.pairs.append(("attention.output_proj.bias", layer.bias))
    table = None
    if embedding is not None:
        table = getattr(embedding, "lut", embedding)
        scale = math.sqrt(table.embedding_dim) if getattr(embedding, "scale", False) else 1.0
        options["embedding"], pairs = _embedding(table, scale)
        reading.pairs.extend(pairs)
        table = table if scale == 1.0 else None  # a scaled copy is not the weight of the output
    _output(decoder.output_layer, table, reading)
    _joeynmt_dropouts(decoder, feeds, reading)
    return reading


def _joeynmt_dropouts(decoder: Any, feeds: bool, reading: _Reading) -> None:
    name = "emb_dropout" if hasattr(decoder, "emb_dropout") else "rnn_input_dropout"
    inputs = getattr(decoder, name).p
    rates = {
        "hidden_dropout": decoder.hidden_dropout.p,
        "dropout between the recurrent layers only": decoder.rnn.dropout,
        f"{name} of the fed states": inputs if feeds else 0.0,
    }
    not_ours = ", ".join(f"{name} ({rate:g})" for name, rate in rates.items() if rate)
    told = f"it has {not_ours}" if not_ours else ""
    _dropouts(decoder, reading, {"input_dropout": 0.0 if feeds else inputs}, told)


def _fairseq(decoder: Any, embedding: Any, generator: Any) -> _Reading:
    table, cells = decoder.embed_tokens, list(decoder.layers)
    ours, pairs = _embedding(table)
    options: dict[str, Any] = {
        **{"input_size": table.embedding_dim, "hidden": decoder.hidden_size, "embedding": ours},
        **{"layers": decoder.num_layers, "bias": cells[0].bias},
        "input_feeding": decoder.encoder_output_units != 0,
    }
    reading = _Reading(options, [*pairs, *_layers([(cell, "") for cell in cells])], [])
    reasons = reading.reasons
    for name, part in (("embedding", embedding), ("generator", generator)):
        if part is not None:
            reasons.append(f"{name} must be None, because the decoder has its own")
    if decoder.residuals:
        reasons.append("it has residuals, which add a layer's state of the step before")
    if decoder.attention is not None:
        options["attention"], pairs = _attention(decoder.attention, reasons)
        reading.pairs.extend(pairs)
    if decoder.adaptive_softmax is not None:
        reasons.append("it has adaptive_softmax_cutoff, an output layer in parts")
    else:
        _fairseq_output(decoder, reading)
    inside, outside = decoder.dropout_in_module, decoder.dropout_out_module
    if any(getattr(part, "apply_during_inference", False) for part in (inside, outside)):
        reasons.append("it has retain_dropout, which drops elements in evaluation mode too")
    narrow = getattr(decoder, "additional_fc", None) is not None and outside.p
    not_ours = f"it has dropout_out ({outside.p:g}) after additional_fc" if narrow else ""
    _dropouts(decoder, reading, {"dropout": outside.p, "input_dropout": inside.p}, not_ours)
    return reading


def _fairseq_output(decoder: Any, reading: _Reading) -> None:
    """The output layer. Since W_o (W x + b) + c = W_o W x + (W_o b + c), our projection between
    has no bias: that of `additional_fc` goes into the bias of the output layer.
    """
    narrow = getattr(decoder, "additional_fc", None)
    table = decoder.embed_tokens
    is_tied = decoder.share_input_output_embed
    weight = table.weight if is_tied else decoder.fc_out.weight
    bias = None if is_tied else decoder.fc_out.bias
    options, pairs = reading.options, reading.pairs
    if narrow is not None:
        options["output_proj_dim"] = narrow.out_features
        pairs.append(("output_proj.weight", narrow.weight))
        if narrow.bias is not None:
            moved = weight.detach() @ narrow.bias.detach()
            bias = moved if bias is None else bias + moved
    options |= {"vocab_size": weight.shape[0], "output_bias": bias is not None}
    options["tie_embedding"] = is_tied
    if not is_tied:
        pairs.append(("output_layer.weight", weight))
    if bias is not None:
        pairs.append(("output_layer.bias", bias))


_READERS: dict[str, Callable[[Any, Any, Any], _Reading]] = {
    "InputFeedRNNDecoder": _opennmt,
    "StdRNNDecoder": _opennmt,
    "RecurrentDecoder": _joeynmt,
    "LSTMDecoder": _fairseq,
}


def initial_state(decoder: nn.Module, encoder_final: Any) -> DecoderState:
    """Return the state with which another toolkit's decoder begins a sentence.

    decoder: as `to_luong_decoder` takes it.
    encoder_final: what the encoder of that toolkit returns as its final state. OpenNMT-py: (h, c),
        or h or (h,), each (layers x directions, N, width). JoeyNMT: the last state (N, width).
        fairseq: (h, c), each (layers, N, width).

    Gradients flow to ``encoder_final`` and to the bridge of ``decoder``. Raises TypeError if
    ``decoder`` is not one of these or ``encoder_final`` has no tensors.
    """
    starts: dict[str, Callable[[Any, Any], tuple[Tensor, ...]]] = {
        **{"InputFeedRNNDecoder": _opennmt_start, "StdRNNDecoder": _opennmt_start},
        **{"RecurrentDecoder": _joeynmt_start, "LSTMDecoder": _fairseq_start},
    }
    start = starts.get(type(decoder).__name__)
    if start is None:
        known = ", ".join(starts)
        raise TypeError(f"decoder must be one of {known}, got {type(decoder).__name__}")
    tensors = encoder_final if isinstance(encoder_final, (tuple, list)) else (encoder_final,)
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise TypeError(f"encoder_final must be a Tensor or a tuple of Tensors, got {kind}")
    return DecoderState(start(decoder, encoder_final))


def _opennmt_start(decoder: Any, final: Any) -> tuple[Tensor, ...]:
    tensors = final if isinstance(final, tuple) else (final,)
    if not decoder.bidirectional_encoder:
        return tensors
    # Layers alternate between the directions.
    return tuple(torch.cat((tensor[0::2], tensor[1::2]), dim=2) for tensor in tensors)


def _joeynmt_start(decoder: Any, final: Tensor) -> tuple[Tensor, ...]:
    bridged = getattr(decoder, "bridge", False)  # of the first versions, as a bool
    option = getattr(decoder, "init_hidden_option", "bridge" if bridged else "zero")
    if option == "bridge":
        first = torch.tanh(decoder.bridge_layer(final))
    elif option == "last":
        first = final[:, : decoder.hidden_size]  # of the forward direction
    else:
        first = final.new_zeros(final.shape[0], decoder.hidden_size)
    hidden = first.unsqueeze(0).repeat(decoder.num_layers, 1, 1)
    return (hidden, hidden) if isinstance(decoder.rnn, nn.LSTM) else (hidden,)


def _fairseq_start(decoder: Any, final: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    bridges = (decoder.encoder_hidden_proj, decoder.encoder_cell_proj)
    pairs = zip(bridges, final, strict=True)
    return tuple(tensor if bridge is None else bridge(tensor) for bridge, tensor in pairs)
