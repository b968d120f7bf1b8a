"""The other levels of the suite: the layer with its projections, and whole models.

All sides have the same parameters. A layer is `LuongAttention` against the formulas of the paper
in tensor operations. A model is `Seq2Seq` with our backend ("fused") against itself with the eager
one; both run step by step in torch. A model that can be decoded natively has a third side,
"native". Every side of ours is judged first: a layer by its output and gradients, a training step
by its loss and gradients against a model in float64, decoding by whether it finds the symbols of
the eager side.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.calls import synchronised
from benchmarks.common.judging import relative_errors, wrong_names
from benchmarks.common.measure import Call, samples
from benchmarks.common.sides import EAGER
from benchmarks.suite.measure import ROUNDS, Record, Timing
from fused_attn import LuongAttention, testing
from fused_attn.seq2seq.config import ModelConfig, SearchConfig
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.search.hypothesis import Hypothesis
from fused_attn.seq2seq.search.packed import PackedModels, not_native_reasons
from fused_attn.seq2seq.search.search import search

OURS, NATIVE = "fused", "native"
# The targets of two sides agree for nearly all sources. They may differ where two symbols are
# equally likely up to rounding.
AGREEING = 0.95


@dataclass(frozen=True)
class LayerCase:
    """A `LuongAttention` and the sizes (B, T, S, D) of its inputs."""

    name: str
    origin: str
    score: str
    sizes: tuple[int, int, int, int]
    quick: bool = False


@dataclass(frozen=True)
class ModelCase:
    """A `Seq2Seq` and what it does: "training" steps, "greedy" or "beam 5" decoding."""

    name: str
    origin: str
    work: str
    config: ModelConfig
    batch: int
    source: int
    target: int
    symbols: int = 4000
    quick: bool = False
    search: SearchConfig = field(default_factory=SearchConfig)


LAYERS = (
    LayerCase("layer, training", "a batch of 64 sentences of IWSLT", "general", (64, 40, 50, 512),
              quick=True),
    LayerCase("layer, training", "a batch of 64 sentences of IWSLT", "dot", (64, 40, 50, 512)),
    LayerCase("layer, training", "a batch of 64 sentences of IWSLT", "concat", (64, 40, 50, 512)),
)  # fmt: skip

_TRANSLATOR: dict[str, Any] = {"hidden": 512, "encoder_hidden": 256, "embedding": 256}
_BEAM = {"search": SearchConfig(beam=5)}
MODELS = tuple(
    ModelCase(f"translator, {work}", "bi-LSTM of width 512, 4,000 symbols", work,
              ModelConfig(score=score, dropout=0.0, **_TRANSLATOR), 32, 40, 40,
              quick=work == "training" and score == "concat", **options)
    for score in ("general", "concat")
    for work, options in (("training", {}), ("greedy", {}), ("beam 5", _BEAM))
) + tuple(
    ModelCase(f"translator, {work}", "bi-LSTM of width 512, 4,000 symbols; one sentence", work,
              ModelConfig(score="general", **_TRANSLATOR), 1, 40, 40,
              quick=work == "greedy", **options)
    for work, options in (("greedy", {}), ("beam 5", _BEAM))
)  # fmt: skip


def layer_id(case: LayerCase) -> str:
    """Names the case in all files of results."""
    return f"{case.name}/{case.score}/float32/{'x'.join(map(str, case.sizes))}/both"


def model_id(case: ModelCase) -> str:
    """Names the case in all files of results."""
    return f"{case.name}/{case.config.score}/float32/{case.batch}x{case.target}x{case.source}"


def measure_layer(case: LayerCase, device: str, backend: str, budget_s: float) -> list[Record]:
    """Forward and backward of the layer, ours and eager."""
    batch, queries, source, width = case.sizes
    torch.manual_seed(0)
    layer = LuongAttention(width, width, score=case.score, output_dim=width, backend=backend)
    layer = layer.to(device)
    query, memory = (torch.randn(batch, n, width, device=device) for n in (queries, source))
    lengths = torch.full((batch,), source, device=device)
    grad = torch.randn(batch, queries, width, device=device)

    def ours(module: LuongAttention, query: Tensor, memory: Tensor) -> Tensor:
        return module(query, memory, lengths.to(memory.device))[0]

    def plain(module: LuongAttention, query: Tensor, memory: Tensor) -> Tensor:
        return eager_layer(module, query, memory)

    def gradients(attend: Callable[..., Tensor], module: nn.Module, *inputs: Tensor) -> Mapping:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        output = attend(module, *leaves)
        wanted = [*leaves, *module.parameters()]
        found = torch.autograd.grad(output, wanted, grad.to(output.dtype))
        names = ["query", "memory", *(name for name, _ in module.named_parameters())]
        grads = {f"grad_{name}": g for name, g in zip(names, found, strict=True)}
        return {"output": output.detach(), **grads}

    exact = copy.deepcopy(layer).double()
    oracle = gradients(plain, exact, query.double(), memory.double())
    beside = gradients(plain, layer, query, memory)
    record = Record(
        layer_id(case), "layer",
        case.name, case.origin, case.score, "float32",
        dict(zip(("batch", "queries", "source", "width"), case.sizes, strict=True)), "both",
        "", False,
    )  # fmt: skip
    calls = {
        OURS: lambda: gradients(ours, layer, query, memory),
        EAGER: lambda: gradients(plain, layer, query, memory),
    }
    results = {OURS: calls[OURS](), EAGER: beside}
    return _timed(record, calls, results, oracle, beside, device, budget_s)


def eager_layer(module: LuongAttention, query: Tensor, memory: Tensor) -> Tensor:
    """Luong et al. 2015, eqs. 5, 7 and 8, with the parameters of a layer."""
    if module.score == "concat":
        keys = module.memory_proj(memory)
        scores = torch.tanh(module.query_proj(query)[:, :, None] + keys[:, None]) @ module.v
    else:
        asked = module.query_proj(query) if module.score == "general" else query
        scores = torch.bmm(asked, memory.transpose(1, 2))
    context = torch.bmm(torch.softmax(scores, dim=-1), memory)
    return torch.tanh(module.output_proj(torch.cat((context, query), dim=-1)))


def measure_model(case: ModelCase, device: str, backend: str, budget_s: float) -> list[Record]:
    """The model at work with our backend and with the eager one."""
    torch.manual_seed(0)
    ours = Seq2Seq(case.config, case.symbols, case.symbols, backend=backend).to(device)
    plain = Seq2Seq(case.config, case.symbols, case.symbols, backend="eager").to(device)
    plain.load_state_dict(ours.state_dict())
    source = torch.randint(3, case.symbols, (case.batch, case.source), device=device)
    lengths = torch.full((case.batch,), case.source, device=device)
    target = torch.randint(3, case.symbols, (case.batch, case.target + 1), device=device)
    models = {OURS: ours, EAGER: plain}
    record = Record(
        model_id(case), "model", case.name, case.origin, case.config.score, "float32",
        {"batch": case.batch, "queries": case.target, "source": case.source,
         "width": case.config.hidden},
        case.work, "", False, tokens=case.batch * case.target,
    )  # fmt: skip
    if case.work != "training":
        return _decoding(record, case, models, (source, lengths), device, budget_s)

    def step(model: Seq2Seq) -> dict[str, Tensor]:
        loss = model.loss(source, lengths, target)
        names, parameters = zip(*model.named_parameters(), strict=True)
        grads = torch.autograd.grad(loss, parameters)
        return {"loss": loss.detach()} | dict(zip(names, grads, strict=True))

    exact = Seq2Seq(case.config, case.symbols, case.symbols, backend="eager").to(device).double()
    exact.load_state_dict(ours.state_dict())
    oracle = step(exact)
    results = {name: step(model) for name, model in models.items()}
    calls: dict[str, Call] = {name: partial(step, model) for name, model in models.items()}
    return _timed(record, calls, results, oracle, results[EAGER], device, budget_s)


def _decoding(
    record: Record,
    case: ModelCase,
    models: Mapping[str, Seq2Seq],
    sources: tuple[Tensor, Tensor],
    device: str,
    budget_s: float,
) -> list[Record]:
    """The records of all sides. All targets have the same length, hence as many steps."""
    length = case.target
    config = replace(case.search, min_length=length, max_length=length)
    calls: dict[str, Callable[[], list[list[Hypothesis]]]] = {
        name: partial(search, model.eval(), *sources, config) for name, model in models.items()
    }
    if not not_native_reasons([models[OURS]]):
        packed = PackedModels([models[OURS]])
        calls[NATIVE] = partial(search, models[OURS], *sources, config, packed=packed)
    found = {name: [best[0].tokens for best in call()] for name, call in calls.items()}
    records = {}
    for name, targets in found.items():
        differ = sum(a != b for a, b in zip(targets, found[EAGER], strict=True)) / case.batch
        ours = name != EAGER
        errors = {"targets that differ": differ} if ours else {}
        wrong = ("targets",) if differ > 1 - AGREEING else ()
        records[name] = replace(record, side=name, ours=ours, errors=errors, wrong=wrong)
    right = {name: call for name, call in calls.items() if not records[name].wrong}
    for name, seconds in samples(_on(right, device), budget_s, ROUNDS).items():
        records[name] = replace(records[name], seconds=Timing.of(seconds))
    return list(records.values())


def _on(calls: Mapping[str, Call], device: str) -> dict[str, Call]:
    if device == "cpu":
        return dict(calls)
    return {name: synchronised(call) for name, call in calls.items()}


def _timed(
    record: Record,
    calls: Mapping[str, Call],
    results: Mapping[str, Mapping[str, Tensor]],
    oracle: Mapping[str, Tensor],
    beside: Mapping[str, Tensor],
    device: str,
    budget_s: float,
) -> list[Record]:
    records = {}
    for side, got in results.items():
        verdicts = {name: testing.judge(got[name], oracle[name], beside[name]) for name in oracle}
        errors, wrong = relative_errors(verdicts), wrong_names(verdicts)
        records[side] = replace(record, side=side, ours=side == OURS, errors=errors, wrong=wrong)
    right = {side: calls[side] for side, found in records.items() if not found.wrong}
    for side, seconds in samples(_on(right, device), budget_s, ROUNDS).items():
        records[side] = replace(records[side], seconds=Timing.of(seconds))
    return list(records.values())
