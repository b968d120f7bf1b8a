"""Sizes of 0 and 1 and fully masked rows, in `LuongAttention` with every option."""

from __future__ import annotations

import inspect
import random
from itertools import product
from typing import Any

import nothing
import pytest
import torch
from nothing import Tensors
from torch import Tensor
from torch.nn.functional import layer_norm

from fused_attn import LuongAttention, PreparedMemory

D, E, A, LONGEST = 3, 5, 4, 3
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "output_dim": {"output_dim": 2},
    "output_bias": {"output_dim": 2, "output_bias": True},
    "monotonic": {"local": "monotonic", "window": 1},
    "predictive": {"local": "predictive", "window": 1.5},
    "sparsemax": {"normalizer": "sparsemax"},
    "weight_norm": {"weight_norm": True},
    "layer_norm": {"layer_norm": True},
    "coverage": {"coverage": True},
    "conv": {"conv_channels": 2, "conv_width": 5},
    "both": {"coverage": True, "conv_channels": 2, "conv_width": 31},
    "scale": {"scale": "learned"},
    "number": {"scale": 0.5},
    "bias": {"bias": True},
    "dropout": {"dropout": 1.0},  # drops every weight, so that nothing is random
    "narrow": {"attn_dim": 1},
    "eager": {"backend": "eager"},
    "sparse, local": {"normalizer": "sparsemax", "local": "predictive", "window": 1.5},
}
OF_CONCAT = {"weight_norm", "layer_norm", "coverage", "conv_channels", "attn_dim"}


def layers() -> list[tuple[str, str]]:
    """All valid pairs (score, name of the options)."""
    pairs = product(("dot", "general", "concat", "location"), OPTIONS)
    return [
        (score, name)
        for score, name in pairs
        if not (score != "concat" and OF_CONCAT & OPTIONS[name].keys())
        and not (score == "dot" and name == "bias")
    ]


def make(score: str, name: str) -> LuongAttention:
    torch.manual_seed(0)
    needed = {"concat": {"attn_dim": A}, "location": {"max_source": LONGEST}}.get(score, {})
    query_dim = E if score == "dot" else D
    return LuongAttention(query_dim, E, score, **(needed | OPTIONS[name]), dtype=torch.float64)


def test_every_option_is_here() -> None:
    parameters = inspect.signature(LuongAttention).parameters
    options = {key for option in OPTIONS.values() for key in option}
    elsewhere = {"query_dim", "memory_dim", "score", "max_source", "device", "dtype"}
    assert set(parameters) == options | elsewhere


def scores_of(
    layer: LuongAttention, query: Tensor, memory: Tensor, coverage: Any, previous: Any
) -> Tensor:
    """The scores before masking, computed from the layer's parameters."""
    source, scale, p = memory.shape[1], layer.scale, dict(layer.named_parameters())
    if "query_proj.weight" in p:
        weight, bias = p["query_proj.weight"], p.get("query_proj.bias", torch.zeros(()))
        if layer.score == "location":
            weight, bias = weight[:source], bias[:source] if bias.dim() else bias
        query = query @ weight.mT + bias
    if layer.score == "location":
        return scale * query
    if layer.score != "concat":
        return scale * (query @ memory.mT)
    keys = memory @ p["memory_proj.weight"].mT
    if layer.layer_norm:
        width = keys.shape[-1:]
        query = layer_norm(query, width, p["query_proj.norm.weight"])
        keys = layer_norm(keys, width, p["memory_proj.norm.weight"], p["memory_proj.norm.bias"])
    keys, v = keys[:, None], p["v"]
    if coverage is not None:
        keys = keys + coverage[..., None] * p["history.coverage_proj.weight"][:, 0]
    if previous is not None:
        features = nothing.convolve(previous, p["history.conv.weight"][:, 0])
        keys = keys + features @ p["history.conv_proj.weight"].mT
    v = v * p["g"] / v.square().sum().sqrt() if "g" in p else v
    return scale * (torch.tanh(query[:, :, None] + keys) * v).sum(dim=-1)


def right(
    layer: LuongAttention,
    leaves: Tensors,
    lengths: Tensor | None,
    mask: Tensor | None,
    positions: Tensor,
) -> Tensors:
    """The correct results of the layer, by formula."""
    query, source = leaves["query"], leaves["memory"].shape[1]
    shape = (*query.shape[:2], source)
    centers = None
    if layer.local == "monotonic":
        centers = positions.double()
    elif layer.local == "predictive":
        whole = torch.tensor(float(source)) if lengths is None else lengths.double()[:, None]
        hidden = torch.tanh(query @ layer.position.proj.weight.mT) @ layer.position.v
        centers = whole * torch.sigmoid(hidden)
    counts = nothing.counted(shape, lengths, mask, centers, layer.window)
    history = [leaves.get(name) for name in ("coverage", "previous_weights")]
    without = nothing.counted(shape, lengths, mask).any(dim=1, keepdim=True)
    history = [None if h is None else h.masked_fill(~without, 0.0) for h in history]
    memory = nothing.clean(leaves["memory"], counts)
    scores = scores_of(layer, query, memory, *history)
    weights, log = nothing.softmax(scores, counts)
    if layer.normalizer == "sparsemax":
        weights = nothing.sparsemax(scores, counts)
    if layer.local == "predictive":
        weights = weights * nothing.gaussian(centers, layer.window, source)
    context = (weights * 0.0 if layer.dropout else weights) @ memory
    if layer.output_dim is not None:
        context = torch.tanh(layer.output_proj(torch.cat((context, query), -1)))
    scores = scores.masked_fill(~counts, -torch.inf)
    return {"context": context, "weights": weights, "scores": scores, "logsumexp": log}


def run(
    layer: LuongAttention,
    leaves: Tensors,
    masks: tuple[Tensor | None, Tensor | None],
    positions: Tensor,
    is_prepared: bool,
    return_weights: bool,
) -> Tensors:
    """Results of `forward`, and of `scores` if there is no history; 2-D results for a step."""
    query, memory = leaves["query"], leaves["memory"]
    history = {key: t for key, t in leaves.items() if key not in ("query", "memory")}
    given: tuple[Any, ...] = (memory, *masks)
    if is_prepared:
        given = (layer.prepare_memory(memory, *masks),)
    local = {"positions": positions} if layer.local == "monotonic" else {}
    found = layer(query, *given, **local, **history, return_weights=return_weights)
    results = dict(zip(("context", "weights"), found, strict=True))
    if not history:
        scored = layer.scores(query, *given, **local)
        results |= dict(zip(("scores", "logsumexp"), scored, strict=True))
    return {key: tensor for key, tensor in results.items() if tensor is not None}


def step(layer: LuongAttention, leaves: Tensors, masks: Any, positions: Tensor, *rest: Any) -> Any:
    """`run` with a query (B, D), with results in the shapes of (B, 1, D)."""
    flat = {key: t if key == "memory" else t.squeeze(1) for key, t in leaves.items()}
    found = run(layer, flat, masks, positions.squeeze(1), *rest)
    return {key: tensor.unsqueeze(1) for key, tensor in found.items()}


def leaves_for(layer: LuongAttention, shape: tuple[int, int, int], has_history: bool) -> Tensors:
    batch, queries, source = shape
    leaves = {
        "query": 0.7 * nothing.draw("query", batch, queries, layer.query_dim),
        "memory": 0.7 * nothing.draw("memory", batch, source, E),
    }
    if layer.history is not None and has_history:
        if layer.history.coverage:
            leaves["coverage"] = nothing.draw("coverage", *shape).abs()
        if layer.history.channels:
            leaves["previous_weights"] = nothing.draw("previous", *shape).abs()
    return {name: tensor.requires_grad_() for name, tensor in leaves.items()}


@pytest.mark.parametrize("score, name", layers())
def test_layers(score: str, name: str) -> None:
    """Every size and mask, prepared or not, with 3-D and 2-D queries; all gradients."""
    layer, rng = make(score, name), random.Random(f"{score} {name}")
    parameters = dict(layer.named_parameters())
    for shape, (lengths, mask) in nothing.some_masks(rng, 2):
        leaves = leaves_for(layer, shape, rng.random() < 0.8)
        masks = (
            nothing.lengths_of(lengths, shape[0], shape[2]),
            nothing.mask_of(mask, *shape),
        )
        positions = torch.arange(shape[1]).expand(shape[:2])
        expected = right(layer, leaves, *masks, positions)
        spoiled = nothing.spoil(leaves["memory"], nothing.counted(shape, *masks))
        call = step if shape[1] == 1 and rng.random() < 0.5 else run
        options = (rng.random() < 0.5, rng.random() < 0.8)
        about = (shape, lengths, mask, call.__name__, *leaves, *options)
        results = call(layer, leaves | {"memory": spoiled}, masks, positions, *options)
        nothing.compare(results, expected, about)
        seeds = {key: nothing.draw(f"grad {key}", *t.shape) for key, t in results.items()}
        wanted = leaves | parameters
        grads = (nothing.gradients(found, wanted, seeds) for found in (results, expected))
        nothing.compare(*grads, about)


ROWS = ((), (0,), (3,), (0, 0), (0, 2, 0), (2, 0, 1))


@pytest.mark.parametrize("score", ["dot", "general", "concat", "location"])
@pytest.mark.parametrize("name", ["plain", "output_dim", "sparsemax", "predictive"])
def test_jagged_memories(score: str, name: str) -> None:
    """No sequences, and empty sequences; prepared or not, with steps and many queries."""
    layer, rng = make(score, name), random.Random(f"{score} {name}")
    parameters = dict(layer.named_parameters())
    for lengths, queries in product(ROWS, nothing.SIZES):
        batch, source = len(lengths), max(lengths, default=0)
        values = 0.7 * nothing.draw("memory", sum(lengths), E)
        leaves = {"query": nothing.draw("query", batch, queries, layer.query_dim)}
        leaves = {key: t.requires_grad_() for key, t in (leaves | {"memory": values}).items()}
        padded = leaves | {"memory": nothing.padded(leaves["memory"], lengths, source)}
        bounds = torch.tensor(lengths, dtype=torch.int64)
        expected = right(layer, padded, bounds, None, torch.zeros(batch, queries))
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        memory: Any = torch.nested.nested_tensor_from_jagged(leaves["memory"], offsets)
        memory = layer.prepare_memory(memory) if rng.random() < 0.3 else memory
        results = dict(zip(("context", "weights"), layer(leaves["query"], memory), strict=True))
        about = (score, name, lengths, queries)
        nothing.compare(results, expected, about)
        seeds = {key: nothing.draw(f"grad {key}", *t.shape) for key, t in results.items()}
        wanted = leaves | parameters
        grads = (nothing.gradients(found, wanted, seeds) for found in (results, expected))
        nothing.compare(*grads, about)


@pytest.mark.parametrize("score", ["dot", "concat"])
def test_no_rows_of_a_prepared_memory(score: str) -> None:
    """An empty batch: no rows selected, in every way; then moved and attended to."""
    layer = make(score, "plain")
    nobody = torch.zeros(0, dtype=torch.int64)
    for batch, source in product(nothing.SIZES, nothing.SIZES):
        lengths, mask = torch.full((batch,), source), torch.ones(batch, 1, source) > 0
        memory = layer.prepare_memory(nothing.draw("memory", batch, source, E), lengths, mask)
        assert len(memory) == batch
        for rows in (nobody, nobody.int(), slice(0, 0), torch.zeros(batch) > 0):
            left = memory[rows] if isinstance(rows, slice) else memory[rows].to(torch.float64)
            assert isinstance(left, PreparedMemory) and len(left) == 0
            assert {tensor.shape[0] for tensor in left._tensors().values()} == {0}
            context, weights = layer(torch.zeros(0, 2, layer.query_dim).double(), left)
            assert context.shape == (0, 2, E) and weights.shape == (0, 2, source)
        every = memory.index_select(torch.arange(batch)).detach()
        query = nothing.draw("query", batch, 2, layer.query_dim)
        for given in (memory, every):
            layer.warm_up(query.requires_grad_(), given)
        assert query.grad is None and all(p.grad is None for p in layer.parameters())
        found, expected = (layer(query, given) for given in (every, memory))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# The warning is about what torch's own compiler does.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("score", ["dot", "concat"])
def test_compiled(score: str) -> None:
    """Compiled as one graph, forward and backward give the same results."""
    layer = make(score, "output_dim")
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for shape in ((3, 2, 0), (0, 0, 3)):
        leaves = leaves_for(layer, shape, False)
        lengths = nothing.lengths_of("mixed", shape[0], shape[2])
        expected = right(layer, leaves, lengths, None, torch.zeros(shape[:2]))
        found = compiled(leaves["query"], leaves["memory"], lengths)
        results = dict(zip(("context", "weights"), found, strict=True))
        nothing.compare(results, expected, shape)
        seeds = {key: nothing.draw(f"grad {key}", *t.shape) for key, t in results.items()}
        wanted = leaves | dict(layer.named_parameters())
        grads = (nothing.gradients(each, wanted, seeds) for each in (results, expected))
        nothing.compare(*grads, shape)
