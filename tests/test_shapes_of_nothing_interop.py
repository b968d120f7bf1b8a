"""Sizes of 0 and 1 and fully masked rows, in the adapters of other toolkits' layers."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import nothing
import pytest
import torch
from nothing import additive
from torch import Tensor, nn

from fused_attn import interop

D, E, A, OUT = 3, 5, 4, 2


@dataclass(frozen=True)
class Case:
    """An adapter, a call of it with tensors (B, T, ...), and its documented formula."""

    make: Callable[[], Any]
    # (layer, query, memory, lengths, coverage) -> context or state (B, T, ...), weights (B, T, S).
    call: Callable[..., tuple[Tensor, Tensor]]
    # (layer, query, memory, lengths) -> scores (B, T, S).
    scores: Callable[..., Tensor]
    # (layer, context, query) -> context or state.
    finish: Callable[[Any, Tensor, Tensor], Tensor] = lambda layer, context, query: context
    query_dim: int = D
    memory_dim: int = E
    is_step: bool = False  # takes one query at a time
    needs_lengths: bool = False
    normalizer: str = "softmax"


def below(lengths: Tensor, source: int) -> Tensor:
    """bool (B, 1, S), True below the length."""
    return (torch.arange(source) < lengths[:, None])[:, None]


def linear(layer: nn.Linear, rows: Tensor) -> Tensor:
    return rows @ layer.weight.mT + (0.0 if layer.bias is None else layer.bias)


def dot(query: Tensor, keys: Tensor) -> Tensor:
    return query @ keys.mT


def state(layer: nn.Linear, first: Tensor, second: Tensor) -> Tensor:
    return linear(layer, torch.cat((first, second), -1))


def opennmt(kind: type[Any], score: str, normalizer: str, has_coverage: bool) -> Case:
    def call(layer: Any, q: Tensor, m: Tensor, lengths: Any, coverage: Any) -> Any:
        masks = lengths
        if kind is interop.EoleGlobalAttention and lengths is not None:
            masks = ~below(lengths, m.shape[1])
        found = layer(q, m, masks, coverage if has_coverage else None)
        if kind is interop.OpenNMT2GlobalAttention:
            return tuple(tensor.transpose(0, 1) for tensor in found)
        return found

    def scores(layer: Any, q: Tensor, m: Tensor, lengths: Any) -> Tensor:
        if score == "mlp":
            keys = linear(layer.linear_context, m)
            return additive(linear(layer.linear_query, q), keys, layer.v.weight[0])
        return dot(linear(layer.linear_in, q) if score == "general" else q, m)

    def finish(layer: Any, context: Tensor, q: Tensor) -> Tensor:
        found = state(layer.linear_out, context, q)
        return found if score == "mlp" else torch.tanh(found)

    def make() -> Any:
        return kind(D, has_coverage, score, normalizer)

    return Case(make, call, scores, finish, D, D, normalizer=normalizer)


def joey(make: Callable[[], Any], scores: Callable[..., Tensor], own_keys: bool = False) -> Case:
    def call(layer: Any, q: Tensor, m: Tensor, lengths: Any, coverage: Any) -> Any:
        layer.compute_proj_keys(m.clone() if own_keys else m)
        return layer(q, below(lengths, m.shape[1]), m)

    return Case(make, call, scores, is_step=True, needs_lengths=True)


def fairseq(bias: bool) -> Case:
    def call(layer: Any, q: Tensor, m: Tensor, lengths: Any, coverage: Any) -> Any:
        padding = None if lengths is None else ~below(lengths, m.shape[1])[:, 0].t()
        found, weights = layer(q[:, 0], m.transpose(0, 1), padding)
        return found[:, None], weights.t()[:, None]

    return Case(
        lambda: interop.FairseqAttentionLayer(D, E, OUT, bias),
        call,
        lambda layer, q, m, _: dot(linear(layer.input_proj, q), m),
        lambda layer, context, q: torch.tanh(state(layer.output_proj, context, q)),
        is_step=True,
    )


def gnmt(normalize: bool, batch_first: bool) -> Case:
    def call(layer: Any, q: Tensor, m: Tensor, lengths: Any, coverage: Any) -> Any:
        turned = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
        layer.mask = None
        if lengths is not None:
            layer.set_mask(lengths, turned(m))
        return tuple(turned(t) for t in layer(turned(q), turned(m)))

    def scores(layer: Any, q: Tensor, m: Tensor, lengths: Any) -> Tensor:
        v, query = layer.linear_att, linear(layer.linear_q, q)
        if normalize:
            v = layer.normalize_scalar * v / v.square().sum().sqrt()
            query = query + layer.normalize_bias
        return additive(query, linear(layer.linear_k, m), v)

    return Case(
        lambda: interop.GNMTBahdanauAttention(D, E, A, normalize, batch_first), call, scores
    )


def tutorial(method: str) -> Case:
    def call(layer: Any, q: Tensor, m: Tensor, lengths: Any, coverage: Any) -> Any:
        return layer.attend(q.transpose(0, 1), m.transpose(0, 1), lengths)

    def scores(layer: Any, q: Tensor, m: Tensor, lengths: Any) -> Tensor:
        if method == "concat":
            on_query, on_memory = layer.attn.weight.split(D, dim=1)
            return additive(q @ on_query.mT + layer.attn.bias, m @ on_memory.mT, layer.v)
        return dot(q, m) if method == "dot" else dot(q @ layer.attn.weight, m)

    return Case(lambda: interop.TutorialAttn(method, D), call, scores, memory_dim=D, is_step=True)


def speechbrain(conv: tuple[int, int] | None) -> Case:
    def make() -> Any:
        sizes = (E, D, A, OUT)
        if conv is None:
            return interop.ContentBasedAttention(*sizes, scaling=0.7)
        return interop.LocationAwareAttention(*sizes, *conv, scaling=0.7)

    def call(layer: Any, q: Tensor, m: Tensor, lengths: Any, coverage: Any) -> Any:
        layer.reset()
        found, weights = layer(m, lengths, q[:, 0])
        return found[:, None], weights[:, None]

    def scores(layer: Any, q: Tensor, m: Tensor, lengths: Any) -> Tensor:
        keys = linear(layer.mlp_enc, m)
        if conv is not None:  # a first step: the weights before are uniform
            before = below(lengths, m.shape[1])[:, 0] / lengths.clamp(min=1)[:, None].double()
            keys = keys + linear(
                layer.mlp_loc, nothing.convolve(before, layer.conv_loc.weight[:, 0])
            )
        return layer.scaling * additive(linear(layer.mlp_dec, q), keys, layer.mlp_attn.weight[0])

    rest = {"is_step": True, "needs_lengths": True}
    return Case(make, call, scores, lambda layer, c, _: linear(layer.mlp_out, c), **rest)


def tfa(kind: str, option: bool, has_mask: bool) -> Case:
    """``option`` turns on scale or normalisation. The widths are set by a first call."""

    def make() -> Any:
        if kind == "luong":
            layer: Any = interop.TFALuongAttention(D, scale=option)
            layer.load_kernels([torch.ones(E, D), *[torch.ones(())] * option])
            return layer
        layer = interop.TFABahdanauAttention(A, normalize=option)
        extra = [torch.ones(()), torch.ones(A)] if option else []
        layer.load_kernels([torch.ones(A), *extra, torch.ones(D, A), torch.ones(E, A)])
        return layer

    def call(layer: Any, q: Tensor, m: Tensor, lengths: Any, coverage: Any) -> Any:
        mask = None if lengths is None or not has_mask else below(lengths, m.shape[1])[:, 0]
        layer.setup_memory(m, None if has_mask else lengths, mask)
        return tuple(tensor[:, None] for tensor in layer.attend(q[:, 0]))

    def scores(layer: Any, q: Tensor, m: Tensor, lengths: Any) -> Tensor:
        keys = linear(layer.memory_layer, m)
        if kind == "luong":
            return dot(q, keys) * (layer.attention_g if option else 1.0)
        v, query = layer.attention_v, linear(layer.query_layer, q)
        if option:
            v, query = layer.attention_g * v / v.square().sum().sqrt(), query + layer.attention_b
        return additive(query, keys, v)

    return Case(make, call, scores, is_step=True)


def keras(kind: str, own_key: bool) -> Case:
    def make() -> Any:
        if kind in ("additive", "plain"):
            layer: Any = interop.KerasAdditiveAttention(use_scale=kind == "additive")
            layer.build(D)
            return layer
        return interop.KerasAttention("scaled" in kind, "concat" if "concat" in kind else "dot")

    def call(layer: Any, q: Tensor, m: Tensor, lengths: Any, coverage: Any) -> Any:
        inputs = [q, m, m.clone()] if own_key else [q, m]
        mask = None if lengths is None else [None, below(lengths, m.shape[1])[:, 0]]
        return layer(inputs, mask, return_attention_scores=True)

    def scores(layer: Any, q: Tensor, m: Tensor, lengths: Any) -> Tensor:
        if kind in ("additive", "plain"):
            return additive(q, m, layer.scale if kind == "additive" else torch.ones(D).double())
        scale = layer.scale if "scaled" in kind else 1.0
        if "concat" not in kind:
            return scale * dot(q, m)
        v = layer.concat_score_weight * torch.ones(D).double()
        return additive(scale * q, scale * m, v)

    return Case(make, call, scores, memory_dim=D)


def joey_bahdanau(layer: Any, q: Tensor, m: Tensor, lengths: Any) -> Tensor:
    keys = linear(layer.key_layer, m)
    return additive(linear(layer.query_layer, q), keys, layer.energy_layer.weight[0])


def joey_luong(layer: Any, q: Tensor, m: Tensor, lengths: Any) -> Tensor:
    return dot(q, linear(layer.key_layer, m))


FORMS = (
    interop.OpenNMTGlobalAttention,
    interop.OpenNMT2GlobalAttention,
    interop.EoleGlobalAttention,
)
CASES: dict[str, Case] = {
    f"{kind.__name__} {score} {normalizer} {'coverage' * has_coverage}": opennmt(
        kind, score, normalizer, has_coverage
    )
    for kind in FORMS
    for score in ("dot", "general", "mlp")
    for normalizer, has_coverage in (("softmax", False), ("softmax", True), ("sparsemax", True))
}
CASES |= {
    "JoeyBahdanau": joey(lambda: interop.JoeyBahdanauAttention(A, E, D), joey_bahdanau),
    "JoeyLuong": joey(lambda: interop.JoeyLuongAttention(D, E), joey_luong),
    "JoeyLuong own keys": joey(lambda: interop.JoeyLuongAttention(D, E), joey_luong, True),
    "ContentBased": speechbrain(None),
    "LocationAware": speechbrain((2, 2)),
    "LocationAware wide": speechbrain((1, 15)),
}
CASES |= {f"Fairseq {bias}": fairseq(bias) for bias in (False, True)}
CASES |= {f"GNMT {n} {first}": gnmt(n, first) for n in (False, True) for first in (False, True)}
CASES |= {f"Tutorial {method}": tutorial(method) for method in ("dot", "general", "concat")}
CASES |= {
    f"TFA {kind} {option}": tfa(kind, option, has_mask)
    for kind in ("luong", "bahdanau")
    for option, has_mask in ((False, True), (True, False))
}
CASES |= {
    f"Keras {kind} {own_key}": keras(kind, own_key)
    for kind in ("dot", "scaled", "concat", "scaled_concat", "additive", "plain")
    for own_key in (False, True)
}


def test_every_adapter_is_here() -> None:
    adapters = {kind for name in interop.__all__ if _is_layer(kind := getattr(interop, name))}
    assert {type(case.make()) for case in CASES.values()} == adapters


def _is_layer(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def made(case: Case) -> Any:
    torch.manual_seed(0)
    layer = case.make().double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-0.9, 0.9)
    return layer


@pytest.mark.parametrize("name", CASES)
def test_adapters(name: str) -> None:
    """Every size, with two kinds of lengths: results, and gradients of inputs and parameters."""
    case, rng = CASES[name], random.Random(name)
    layer = made(case)
    kinds = nothing.LENGTHS[case.needs_lengths :]
    for batch, queries, source in nothing.BATCHES:
        if case.is_step and queries != 1:
            continue
        for kind in rng.sample(kinds, 2):
            leaves = {
                "query": nothing.draw("query", batch, queries, case.query_dim),
                "memory": nothing.draw("memory", batch, source, case.memory_dim),
            }
            leaves = {key: (0.7 * leaf).requires_grad_() for key, leaf in leaves.items()}
            lengths = nothing.lengths_of(kind, batch, source)
            coverage = nothing.draw("coverage", batch, source).abs()
            expected = right(case, layer, leaves, lengths, coverage)
            counts = nothing.counted((batch, 1, source), lengths, None)
            memory = nothing.spoil(leaves["memory"], counts)
            found = case.call(layer, leaves["query"], memory, lengths, coverage)
            results = dict(zip(("context", "weights"), found, strict=True))
            about = (name, batch, queries, source, kind)
            nothing.compare(results, expected, about)
            seeds = {key: nothing.draw(f"grad {key}", *t.shape) for key, t in expected.items()}
            wanted = leaves | dict(layer.named_parameters())
            grads = (nothing.gradients(each, wanted, seeds) for each in (results, expected))
            nothing.compare(*grads, about)


def right(case: Case, layer: Any, leaves: Any, lengths: Any, coverage: Tensor) -> Any:
    query, memory = leaves["query"], leaves["memory"]
    counts = nothing.counted((*query.shape[:2], memory.shape[1]), lengths, None)
    read = nothing.counted((query.shape[0], 1, memory.shape[1]), lengths, None)
    memory = nothing.clean(memory, read)
    if hasattr(layer, "linear_cover"):
        memory = torch.tanh(
            memory + (coverage * read[:, 0])[..., None] * layer.linear_cover.weight[:, 0]
        )
    scores = case.scores(layer, query, memory, lengths)
    weights, _ = nothing.softmax(scores, counts)
    if case.normalizer == "sparsemax":
        weights = nothing.sparsemax(scores, counts)
    return {"context": case.finish(layer, weights @ memory, query), "weights": weights}
