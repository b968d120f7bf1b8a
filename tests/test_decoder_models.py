"""The native decoder against the torch models in float64: every step, cell, option and type."""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn import packed
from fused_attn.choices import COMPUTE
from fused_attn.seq2seq import ModelConfig, Seq2Seq
from fused_attn.seq2seq.search.packed import spec_of
from fused_attn.seq2seq.vocabulary import BOS

native = packed.native_module()
if native is None:
    pytest.skip("the native module is not built", allow_module_level=True)

ISAS = native.cpu_isas_supported()
SOURCES, TARGETS = 19, 23
BASE = ModelConfig(hidden=17, embedding=7, layers=2, dropout=0.0)

CONFIGS = {
    "lstm general": BASE,
    "gru concat": replace(BASE, cell="gru", score="concat", attn_dim=13),
    "rnn dot": replace(BASE, cell="rnn", score="dot"),
    "dot of equal widths": replace(BASE, score="dot", bidirectional=False),
    "lstm none": replace(BASE, score="none", bridge="dense"),
    "location": replace(BASE, score="location", max_source=12, cell="gru"),
    "input feeding": replace(BASE, input_feeding=True),
    "gru input feeding concat": replace(
        BASE, cell="gru", input_feeding=True, score="concat", bridge="mean"
    ),
    "rnn input feeding": replace(BASE, cell="rnn", input_feeding=True, layers=1),
    "coverage": replace(BASE, score="concat", coverage=True),
    "coverage and feeding": replace(BASE, score="concat", coverage=True, input_feeding=True),
    "monotonic": replace(BASE, local="monotonic", window=2),
    "predictive": replace(BASE, local="predictive", window=3),
    "predictive concat": replace(BASE, local="predictive", window=2, score="concat"),
    "monotonic location": replace(
        BASE, local="monotonic", window=2, score="location", max_source=12
    ),
    "predictive dot": replace(BASE, local="predictive", window=1, score="dot"),
    "residual": replace(BASE, residual=True, layers=3, embedding=17, bidirectional=False),
    "residual gru": replace(BASE, residual=True, cell="gru", layers=3, encoder_hidden=5),
    "shared": replace(BASE, share=True, bidirectional=False, residual=True),
    "tied output": replace(BASE, tie="output"),
    "tied all": replace(BASE, tie="all"),
    "tied equal widths": replace(BASE, tie="output", embedding=17),
    "reversed": replace(BASE, reverse_source=True),
    "reversed one direction": replace(BASE, reverse_source=True, bidirectional=False),
    "bridge last": replace(BASE, bridge="last", encoder_hidden=17, bidirectional=False),
    "bridge zero": replace(BASE, bridge="zero"),
    "bridge mean": replace(BASE, bridge="mean", cell="gru"),
    "deep encoder": replace(BASE, layers=1, encoder_layers=3, bridge="dense"),
    "deep decoder": replace(BASE, layers=3, encoder_layers=1, cell="rnn"),
    "widths of vectors": replace(BASE, hidden=64, embedding=32, layers=1),
    "large vocabulary": replace(BASE, embedding=3),
}


# The best instruction set runs every configuration in every type; the others these, which have all
# kernels among them.
WITH_ALL_KERNELS = ("lstm general", "gru input feeding concat", "predictive dot", "coverage")
RUNS = [
    (isa, name) for isa in ISAS for name in CONFIGS if isa == ISAS[0] or name in WITH_ALL_KERNELS
]


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.cpu_isa()
    native.set_cpu_isa(request.param)
    yield request.param
    native.set_cpu_isa(before)


def model_of(config: ModelConfig, seed: int = 0) -> Seq2Seq:
    """A model whose states and weights are not close to zero."""
    torch.manual_seed(seed)
    size = TARGETS if config.tie == "all" else SOURCES
    model = Seq2Seq(config, size, TARGETS, backend="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 1.5 / parameter.shape[-1] ** 0.5)
    return model


def inputs_of(config: ModelConfig, steps: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Sources of lengths 1 to 12 in no order, and symbols to feed."""
    torch.manual_seed(1)
    lengths = torch.tensor([7, 1, 12, 2, 7, 11])
    source = torch.randint(3, SOURCES, (len(lengths), 12))
    inputs = torch.randint(3, TARGETS, (len(lengths), steps))
    inputs[:, 0] = BOS
    return source, lengths, inputs


def torch_results(model: Seq2Seq, rows: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Memory, logits and weights of the torch model, in its own dtype."""
    source, lengths, inputs = rows
    with torch.no_grad():
        memory, _ = model.encode(source, lengths)
        logits, weights = model(source, lengths, inputs, return_weights=True)
    inside = torch.arange(source.shape[1]) < lengths[:, None]
    memory = memory.masked_fill(~inside[..., None], 0.0)  # the projection of padding is not used
    return [memory, logits] if weights is None else [memory, logits, weights]


def native_results(
    model: Seq2Seq,
    rows: tuple[Tensor, Tensor, Tensor],
    compute: str = "float32",
    threads: int = 1,
) -> list[Tensor]:
    source, lengths, inputs = rows
    made = native.PackedModel(spec_of(model, compute))
    memory, hidden, cell = made.encode(source, lengths, threads)
    inside = torch.arange(source.shape[1]) < lengths[:, None]
    poisoned = memory.masked_fill(~inside[..., None], torch.nan)  # nothing may read the padding
    state = (hidden, cell, None, None, 0)
    _, logits, weights, *_ = made.run_steps(inputs, poisoned, lengths, state, True, threads)
    return [memory, logits] if weights is None else [memory, logits, weights]


def errors(results: list[Tensor], exact: list[Tensor]) -> list[float]:
    assert len(results) == len(exact)
    pairs = zip(results, exact, strict=True)
    return [float((one.double() - other).abs().max()) for one, other in pairs]


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_step_agrees_with_float64(name: str, isa: str) -> None:
    model, rows = model_of(CONFIGS[name]), inputs_of(CONFIGS[name])
    exact = torch_results(deepcopy(model).double(), rows)
    eager = errors(torch_results(model, rows), exact)
    found = native_results(model, rows)
    for own, other, scale in zip(errors(found, exact), eager, exact, strict=True):
        rounding = 16 * torch.finfo(torch.float32).eps * float(scale.abs().max().clamp(min=1.0))
        assert own <= 2 * other + rounding


@pytest.mark.parametrize("compute", ["bfloat16", "int8"])
@pytest.mark.parametrize(("isa", "name"), RUNS, indirect=["isa"])
def test_narrow_types_are_near(name: str, compute: str, isa: str) -> None:
    """The error is bounded by that of torch with the weights rounded to the type, several times."""
    model, rows = model_of(CONFIGS[name]), inputs_of(CONFIGS[name])
    exact = torch_results(deepcopy(model).double(), rows)
    rounded = deepcopy(model)
    with torch.no_grad():
        for parameter in rounded.parameters():
            if parameter.ndim == 2:
                parameter.copy_(narrowed(parameter, compute))
    near = errors(torch_results(rounded, rows), exact)
    for own, other in zip(errors(native_results(model, rows, compute), exact), near, strict=True):
        assert own <= 8 * other + 1e-3


def narrowed(weight: Tensor, compute: str) -> Tensor:
    if compute == "bfloat16":
        return weight.bfloat16().float()
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127
    return (weight / scale).round() * scale


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize(("isa", "name"), RUNS, indirect=["isa"])
def test_a_row_has_the_same_bits_in_any_batch_and_on_any_threads(
    name: str, compute: str, isa: str
) -> None:
    model, rows = model_of(CONFIGS[name]), inputs_of(CONFIGS[name])
    together = native_results(model, rows, compute)
    for part, threaded in zip(together, native_results(model, rows, compute, 3), strict=True):
        assert torch.equal(part, threaded)
    for b in range(len(rows[0])):
        alone = native_results(model, tuple(each[b : b + 1] for each in rows), compute)
        for one, part in zip(alone, together, strict=True):
            assert torch.equal(one[0], part[b])


def test_steps_go_on_from_a_state() -> None:
    """Steps in two calls are the steps of one call, for every part of the state."""
    config = CONFIGS["coverage and feeding"]
    model, (source, lengths, inputs) = model_of(config), inputs_of(config)
    made = native.PackedModel(spec_of(model, "float32"))
    memory, hidden, cell = made.encode(source, lengths, 1)
    once = made.run_steps(inputs, memory, lengths, (hidden, cell, None, None, 0), True, 1)
    first = made.run_steps(inputs[:, :2], memory, lengths, (hidden, cell, None, None, 0), True, 1)
    rest = made.run_steps(inputs[:, 2:], memory, lengths, (*first[3:], 2), True, 1)
    for number in range(3):
        assert torch.equal(torch.cat((first[number], rest[number]), dim=1), once[number])
    for number in range(3, 7):
        assert torch.equal(rest[number], once[number])


def test_nothing_is_decoded_for_no_rows() -> None:
    model = model_of(BASE)
    made = native.PackedModel(spec_of(model, "float32"))
    rows = (torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    memory, hidden, cell = made.encode(*rows, 1)
    assert memory.shape == (0, 3, 34)
    inputs = torch.zeros(0, 4, dtype=torch.int64)
    states, logits, *_ = made.run_steps(
        inputs, memory, None, (hidden, cell, None, None, 0), False, 1
    )
    assert states.shape == (0, 4, 17)
    assert logits.shape == (0, 4, TARGETS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_bias": torch.zeros(3)}, "output_bias must have shape"),
        ({"embedding": torch.zeros(TARGETS, 7).double()}, "embedding must have the dtype float32"),
        ({"output_weight": torch.zeros(TARGETS, 16)}, "output_weight must have shape"),
        ({"cell": "lstn"}, "cell must be one of lstm, gru, rnn, got 'lstn'"),
        ({"compute": "int4"}, "compute must be one of"),
        ({"layers": []}, "layers must not be empty"),
        ({"embedding": None, "input_feeding": True}, "layers"),
    ],
)
def test_wrong_parameters_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        native.PackedModel({**spec_of(model_of(BASE), "float32"), **change})


@pytest.mark.parametrize(
    ("name", "part", "change", "message"),
    [
        ("coverage", "attention", {"v": None}, "v must not be None"),
        ("predictive", "attention", {"position_v": None}, "position_v must not be None"),
        ("bridge zero", "encoder", {"bridge": "last"}, "bridge last needs an encoder as wide"),
        ("lstm general", "encoder", {"maps": []}, "bridge.maps must have 2 maps, got 0"),
        ("lstm general", "encoder", {"bridge": "first"}, "bridge must be one of"),
        ("lstm none", "encoder", {"layers": [[], []]}, "encoder.layers"),
        ("predictive dot", "encoder", {"memory_proj": None}, "takes a memory of width 17"),
    ],
)
def test_wrong_parts_are_named(name: str, part: str, change: dict[str, Any], message: str) -> None:
    spec = spec_of(model_of(CONFIGS[name]), "float32")
    with pytest.raises((TypeError, ValueError, IndexError), match=message):
        native.PackedModel({**spec, part: {**spec[part], **change}})


SEARCH = {
    **{"most": 1, "nbest_mass": 0.0, "length_penalty": "none", "alpha": 0.0},
    **{"coverage_penalty": 0.0, "min_length": 0, "block_ngrams": 0, "sample": False},
    **{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0, "return_weights": False},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"most": 0}, "most must be at least 1, got 0"),
        ({"most": 2}, "most must lie in 1..1, got 2"),
        ({"block_ngrams": -1}, "block_ngrams must be at least 0, got -1"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": math.nan}, "top_p must be above 0, got nan"),
        ({"temperature": -1.0}, "temperature must be above 0"),
        ({"length_penalty": "long"}, "length_penalty must be one of none, average, gnmt"),
    ],
)
def test_wrong_options_are_named(change: dict[str, Any], message: str) -> None:
    made = native.PackedModel(spec_of(model_of(BASE), "float32"))
    rows = (torch.tensor([[3, 4]]), torch.tensor([2]), torch.tensor([5]))
    with pytest.raises(ValueError, match=message):
        native.search([made], *rows, None, 1, {**SEARCH, **change}, 1)
    with pytest.raises(ValueError, match="limits must lie in"):
        native.search([made], *rows[:2], torch.tensor([2**62]), None, 1, SEARCH, 1)
    with pytest.raises(TypeError, match="got None"):
        native.search([None], *rows, None, 1, SEARCH, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": torch.tensor([3, 4])}, "source must have 2 dimensions, got shape"),
        ({"source": torch.tensor([[3, SOURCES]])}, f"source must lie in 0..{SOURCES - 1}, got"),
        ({"source": torch.tensor([[3, -1]])}, "source must lie in"),
        ({"lengths": torch.tensor([3])}, "source_lengths must lie in 1..2, got 3"),
        ({"lengths": torch.tensor([0])}, "source_lengths must lie in 1..2, got 0"),
        ({"lengths": torch.tensor([1, 1])}, "source_lengths must have shape"),
        ({"source": torch.zeros(1, 2)}, "source must be an int64 Tensor"),
    ],
)
def test_wrong_sources_are_named(change: dict[str, Tensor], message: str) -> None:
    made = native.PackedModel(spec_of(model_of(BASE), "float32"))
    rows = {"source": torch.tensor([[3, 4]]), "lengths": torch.tensor([2])} | change
    with pytest.raises((TypeError, ValueError), match=message):
        made.encode(rows["source"], rows["lengths"], 1)
