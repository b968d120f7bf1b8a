"""`LuongDecoder`: wrong options and inputs, and its description by tensors."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fused_attn import DecoderState, LuongAttention, LuongDecoder

N, T, S, V, E, H = 3, 5, 7, 9, 5, 6
USUAL: dict[str, Any] = {"input_size": 4, "hidden": H, "embedding": V, "vocab_size": V}
USUAL |= {"attention": {"memory_dim": E, "output_dim": H}}
COVERAGE = {"score": "concat", "memory_dim": E, "coverage": True}


def make(**options: Any) -> LuongDecoder:
    torch.manual_seed(0)
    return LuongDecoder(**USUAL | options).eval()


BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input_size": 0}, ValueError, "input_size must be a positive int, got 0"),
    ({"hidden": 2.5}, ValueError, "hidden must be a positive int, got 2.5"),
    ({"layers": 0}, ValueError, "layers must be a positive int, got 0"),
    ({"cell": "sru"}, ValueError, "cell must be one of 'lstm', 'gru', 'rnn', got 'sru'"),
    ({"dropout": 1.5}, ValueError, "dropout must be a probability in 0..1, got 1.5"),
    ({"input_dropout": "a"}, TypeError, "input_dropout must be a probability in 0..1, got 'a'"),
    ({"embedding": 0}, ValueError, "embedding must be a positive int, got 0"),
    (
        {"embedding": "words"},
        TypeError,
        "embedding must be an nn.Embedding, a number of symbols or None, got str",
    ),
    (
        {"embedding": nn.Embedding(V, 3)},
        ValueError,
        "embedding must have the width input_size = 4, got 3",
    ),
    (
        {"attention": "general"},
        TypeError,
        "attention must be a LuongAttention, its options or None, got str",
    ),
    (
        {"attention": LuongAttention(3)},
        ValueError,
        "attention must have query_dim = hidden = 6, got 3",
    ),
    ({"attention": {"score": "cos"}}, ValueError, "score must be one of 'dot', 'general'"),
    ({"vocab_size": -1}, ValueError, "vocab_size must be a positive int, got -1"),
    (
        {"vocab_size": None, "output_proj_dim": 3},
        ValueError,
        "output_proj_dim must be None without an output layer (vocab_size=None), got 3",
    ),
    (
        {"tie_embedding": True, "embedding": None},
        ValueError,
        "tie_embedding=True requires an embedding, got embedding=None",
    ),
    (
        {"tie_embedding": True, "vocab_size": 8},
        ValueError,
        "requires vocab_size to be None or the number of symbols of the embedding, 9, got 8",
    ),
    (
        {"tie_embedding": True},
        ValueError,
        "the output layer has the width of the embedding, 4, got 6: set output_proj_dim=4",
    ),
]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [pytest.param(*row, id="-".join(row[0])) for row in BAD_OPTIONS],
)
def test_bad_option(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        LuongDecoder(**USUAL | options)


MEMORY, INPUTS = torch.randn(N, S, E), torch.ones(N, T, dtype=torch.int64)
HIDDEN = (torch.zeros(1, N, H), torch.zeros(1, N, H))
# By name: options of the decoder, arguments of forward, the error and its message.
BAD_CALLS: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "inputs_type": ({}, {"inputs": [1]}, TypeError, "inputs must be a Tensor, got list"),
    "inputs_dtype": (
        *({}, {"inputs": INPUTS.bool()}, TypeError),
        "inputs must be int64 symbols or embedded symbols, got bool",
    ),
    "inputs_shape": (
        *({}, {"inputs": INPUTS[0]}, ValueError),
        "inputs must have shape (N, T), got (5,)",
    ),
    "inputs_width": (
        *({}, {"inputs": torch.ones(N, T, 3)}, ValueError),
        "embedded inputs must have shape (N, T, 4), got (3, 5, 3)",
    ),
    "inputs_precision": (
        *({}, {"inputs": torch.ones(N, T, 4).double()}, TypeError),
        "inputs must have the dtype of the decoder, float32, got float64",
    ),
    "inputs_range": (
        *({}, {"inputs": INPUTS * 9}, ValueError),
        "inputs must be symbols in 0..8, got 9..9",
    ),
    "no_embedding": (
        *({"embedding": None}, {}, ValueError),
        "inputs must be embedded symbols (N, T, 4), because the decoder has no embedding",
    ),
    "no_memory": (
        *({}, {"memory": None}, ValueError),
        "memory must be given to a decoder with attention, got None",
    ),
    "memory_unwanted": (
        *({"attention": None}, {}, ValueError),
        "memory must be None for a decoder without attention",
    ),
    "lengths_unwanted": (
        *({"attention": None}, {"memory": None, "memory_lengths": INPUTS[:, 0]}, ValueError),
        "memory_lengths must be None for a decoder without attention",
    ),
    "memory_type": (
        *({}, {"memory": "m"}, TypeError),
        "memory must be a Tensor (N, S, E) or a PreparedMemory, got str",
    ),
    "memory_dims": (
        *({}, {"memory": MEMORY[0]}, ValueError),
        "memory must be a Tensor (N, S, E) or a PreparedMemory, got (7, 5)",
    ),
    "memory_rows": (
        *({}, {"memory": MEMORY[:2]}, ValueError),
        "memory must have a row for each of the 3 rows of inputs, got 2",
    ),
    "memory_width": (
        *({}, {"memory": MEMORY[..., :4]}, ValueError),
        "memory must have shape (B, S, 5), got (3, 7, 4)",
    ),
    "memory_precision": (
        *({}, {"memory": MEMORY.double()}, TypeError),
        "memory must have the dtype of the decoder, float32, got float64",
    ),
    "memory_device": (
        *({}, {"memory": MEMORY.to("meta")}, ValueError),
        "memory must be on the device of the decoder, cpu, got meta",
    ),
    "lengths": (
        *({"input_feeding": True}, {"memory_lengths": INPUTS[:, 0] + S}, ValueError),
        "memory_lengths must",
    ),
    "state_type": (
        *({}, {"state": HIDDEN}, TypeError),
        "state must be a DecoderState or None, got tuple",
    ),
    "state_hidden_type": (
        *({}, {"state": DecoderState(HIDDEN[0])}, ValueError),  # type: ignore[arg-type]
        "state.hidden must be a tuple of tensors (layers, N, hidden), got Tensor",
    ),
    "state_hidden_dims": (
        *({}, {"state": DecoderState((HIDDEN[0][0], HIDDEN[1][0]))}, ValueError),
        "state.hidden must be a tuple of tensors (layers, N, hidden), got (3, 6)",
    ),
    "state_precision": (
        *({}, {"state": DecoderState((HIDDEN[0], HIDDEN[1].double()))}, TypeError),
        "state.hidden[1] must have the dtype of the decoder, float32, got float64",
    ),
    "state_lstm": (
        *({}, {"state": DecoderState(HIDDEN[:1])}, ValueError),
        "state.hidden must be a tuple of tensors (h, c), got 1 of them",
    ),
    "state_gru": (
        *({"cell": "gru"}, {"state": DecoderState(HIDDEN)}, ValueError),
        "state.hidden must be a tuple of tensors (h,), got 2 of them",
    ),
    "state_shape": (
        *({"layers": 2}, {"state": DecoderState(HIDDEN)}, ValueError),
        "state.hidden[0] must have shape (2, 3, 6), got (1, 3, 6)",
    ),
    "state_fed": (
        *({"input_feeding": True}, {"state": DecoderState(HIDDEN, torch.zeros(N, 2))}, ValueError),
        "state.attentional must have shape (3, 6), got (3, 2)",
    ),
    "state_unused": (
        *({}, {"state": DecoderState(HIDDEN, torch.zeros(N, H))}, ValueError),
        "state.attentional must be None: this decoder does not use it",
    ),
    "state_coverage": (
        {"attention": COVERAGE},
        {"state": DecoderState(HIDDEN, None, torch.zeros(N, 3))},
        *(ValueError, "state.coverage must have shape (3, 7), got (3, 3)"),
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call(name: str) -> None:
    options, arguments, error, message = BAD_CALLS[name]
    decoder = make(**options)
    with pytest.raises(error, match=re.escape(message)):
        decoder(**{"inputs": INPUTS, "memory": MEMORY} | arguments)


def test_a_prepared_memory_has_its_own_lengths() -> None:
    for options in ({}, {"input_feeding": True}):
        decoder = make(**options)
        prepared = decoder.attention.prepare_memory(MEMORY)
        with pytest.raises(ValueError, match="memory_lengths and memory_mask must be None if"):
            decoder(INPUTS, prepared, torch.ones(N, dtype=torch.int64))


BAD_GREEDY: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"embedding": None}, {}, "greedy requires a decoder with the option embedding"),
    ({"vocab_size": None}, {}, "greedy requires a decoder with the option vocab_size"),
    ({"vocab_size": 11}, {}, "greedy requires an embedding of all symbols of the output layer"),
    ({}, {"bos": 9}, "bos must be a symbol in 0..8, got 9"),
    ({}, {"eos": -1}, "eos must be a symbol in 0..8, got -1"),
    ({"vocab_size": 3}, {"eos": 3}, "eos must be a symbol in 0..2, got 3"),
    ({}, {"max_length": 0}, "max_length must be a positive int, got 0"),
    ({}, {"memory": None}, "memory must be given to a decoder with attention, got None"),
    ({"attention": None}, {"memory": None}, "state must be given to a decoder without attention"),
]


@pytest.mark.parametrize(("options", "arguments", "message"), BAD_GREEDY)
def test_bad_greedy(options: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    decoder = make(**options)
    with pytest.raises(ValueError, match=re.escape(message)):
        decoder.greedy(**{"memory": MEMORY, "bos": 1, "eos": 2, "max_length": 3} | arguments)


def test_the_description_holds_the_parameters_themselves() -> None:
    attention = {"score": "concat", "memory_dim": E, "attn_dim": 8, "output_dim": 4}
    attention |= {"bias": True, "output_bias": True, "coverage": True, "scale": "learned"}
    attention |= {"weight_norm": True, "local": "predictive", "window": 3}
    decoder = make(attention=attention, layers=2, residual=True, input_feeding=True, cell="gru")
    with torch.no_grad():
        decoder.attention.scale.fill_(0.3)
    spec = decoder._spec()
    assert (spec["cell"], spec["residual"], spec["input_feeding"]) == ("gru", True, True)
    for layer, weights in zip(decoder.recurrent.layers, spec["layers"], strict=True):
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        for name, weight in zip(names, weights, strict=True):
            assert weight.data_ptr() == getattr(layer, name).data_ptr()
            assert not weight.requires_grad
    assert spec["layers"][0][0].shape == (3 * H, 4 + 4)
    assert spec["embedding"].data_ptr() == decoder.embedding.weight.data_ptr()
    assert spec["output_weight"].data_ptr() == decoder.output_layer.weight.data_ptr()
    assert spec["output_bias"].data_ptr() == decoder.output_layer.bias.data_ptr()
    assert spec["output_proj"] is None
    layer, held = decoder.attention, spec["attention"]
    assert (held["score"], held["scale"]) == ("concat", 1.0)
    assert (held["local"], held["window"]) == ("predictive", 3.0)
    v = 0.3 * layer.g * layer.v / layer.v.norm()
    torch.testing.assert_close(held["v"], v.detach())
    expected: dict[str, Tensor] = {
        "query_weight": layer.query_proj.weight,
        "query_bias": layer.query_proj.bias,
        "memory_weight": layer.memory_proj.weight,
        "coverage_weight": layer.history.coverage_proj.weight[:, 0],
        "position_weight": layer.position.proj.weight,
        "position_v": layer.position.v,
        "combine_weight": layer.output_proj.weight,
        "combine_bias": layer.output_proj.bias,
    }
    for name, tensor in expected.items():
        assert held[name].data_ptr() == tensor.data_ptr() and held[name].shape == tensor.shape


def test_the_description_of_a_small_decoder() -> None:
    decoder = make(
        attention={"score": "dot", "scale": 0.5},
        **{"bias": False, "output_bias": False, "tie_embedding": True, "output_proj_dim": 4},
    )
    spec = decoder._spec()
    assert [weight is None for weight in spec["layers"][0]] == [False, False, True, True]
    assert spec["output_weight"].data_ptr() == spec["embedding"].data_ptr()
    assert spec["output_bias"] is None and spec["output_proj"].shape == (4, H)
    held = spec["attention"]
    assert held.pop("score") == "dot" and held.pop("scale") == 0.5 and held.pop("window") == 10.0
    assert held.pop("memory_width") == H
    assert set(held.values()) == {None}
    spec = make(attention=None, embedding=None, vocab_size=None)._spec()
    assert spec["attention"] is spec["embedding"] is spec["output_weight"] is None


def hooked(decoder: LuongDecoder) -> None:
    decoder.recurrent.layers[0].register_forward_hook(lambda *_: None)


def parametrized(decoder: LuongDecoder) -> None:
    parametrizations.weight_norm(decoder.output_layer)


def replaced(decoder: LuongDecoder) -> None:
    decoder.attention.query_proj = nn.Sequential(decoder.attention.query_proj)


def rectified(decoder: LuongDecoder) -> None:
    decoder.recurrent.layers[0].nonlinearity = "relu"


def limited(decoder: LuongDecoder) -> None:
    decoder.embedding.max_norm = 1.0


CONCAT = {"score": "concat", "memory_dim": E}
# Options, a change, and the reason that it gives.
REASONS: dict[str, tuple[dict[str, Any], Any, str]] = {
    "layer_norm": (
        *({"attention": {**CONCAT, "layer_norm": True}}, None),
        "attention has layer_norm=True",
    ),
    "sparsemax": (
        *({"attention": {"memory_dim": E, "normalizer": "sparsemax"}}, None),
        "attention has normalizer='sparsemax'",
    ),
    "conv": (
        *({"attention": {**CONCAT, "conv_channels": 3}}, None),
        "attention has conv_channels=3",
    ),
    "backend": (
        *({"attention": {"memory_dim": E, "backend": "eager"}}, None),
        "attention has backend='eager'",
    ),
    "attention_dropout": (
        *({"attention": {"memory_dim": E, "dropout": 0.25}}, LuongDecoder.train),
        "attention has dropout=0.25 in training mode",
    ),
    "dropout": ({"dropout": 0.5}, LuongDecoder.train, "dropout=0.5 in training mode"),
    "float64": ({}, LuongDecoder.double, "must be float32 on cpu, got float64 on cpu"),
    "meta": ({"device": "meta"}, None, "must be float32 on cpu, got float32 on meta"),
    "hooks": ({}, hooked, "recurrent.layers.0 has hooks (_forward_hooks)"),
    "parametrized": ({}, parametrized, "output_layer is a ParametrizedLinear"),
    "replaced": ({}, replaced, "attention.query_proj is a Sequential"),
    "relu": ({"cell": "rnn"}, rectified, "recurrent.layers.0 has nonlinearity='relu'"),
    "max_norm": ({}, limited, "embedding has max_norm"),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_the_tensors_do_not_describe(name: str) -> None:
    options, change, reason = REASONS[name]
    decoder = make(**options)
    if change is not None:
        change(decoder)
    with pytest.raises(ValueError, match=f"described by its tensors: .*{re.escape(reason)}"):
        decoder._spec()


def test_global_hooks_are_a_reason() -> None:
    decoder = copy.deepcopy(make())
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(ValueError, match="there are global module hooks"):
            decoder._spec()
    finally:
        handle.remove()
    assert decoder._spec()["cell"] == "lstm"
