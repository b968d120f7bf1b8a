"""Sizes of 0 and 1 and fully masked rows, in every public function."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from typing import Any

import nothing
import pytest
import torch
from nothing import Tensors
from torch import Tensor

import fused_attn
from fused_attn import LocalWindow, coverage_loss, sparsemax

# Public names that are not functions of queries and a memory. Add new ones of this kind here.
OTHERS = {"LocalWindow", "LuongAttention", "PreparedMemory", "__version__"}
OTHERS |= {"coverage_loss", "sparsemax"}
OTHERS |= {"LuongDecoder", "DecoderOutput", "DecoderState", "GreedyOutput"}
FUNCTIONS = sorted(set(fused_attn.__all__) - OTHERS)
ATTENTIONS = [name for name in FUNCTIONS if name.endswith("_attention")]
HALF_WIDTH = 1.5
WIDTHS = {"D": 2, "E": 5, "A": 3}


def operands_of(function: Callable[..., Any], shape: tuple[int, int, int]) -> Tensors:
    """Values, by name, for every tensor parameter that gets a gradient."""
    batch, queries, source = shape
    d, e, a = WIDTHS.values()
    names = inspect.signature(function).parameters
    d = d if "weight" in names or "v" in names else e  # dot has only one width
    shapes = {
        "query": (batch, queries, d),
        "memory": (batch, source, e),
        "weight": (d, e),
        "query_weight": (a, d),
        "memory_weight": (a, e),
        "v": (a,),
        "bias": (a,),
        "scale": (),
    }
    return {n: nothing.draw(n, *shapes[n]).requires_grad_() for n in names if n in shapes}


def right(leaves: Tensors, counts: Tensor) -> Tensors:
    memory = nothing.clean(leaves["memory"], counts)
    query = leaves["query"]
    if "v" in leaves:
        query = query @ leaves["query_weight"].mT + leaves["bias"]
        scores = nothing.additive(query, memory @ leaves["memory_weight"].mT, leaves["v"])
    else:
        query = query @ leaves["weight"] if "weight" in leaves else query
        scores = leaves["scale"] * (query @ memory.mT)
    weights, log = nothing.softmax(scores, counts)
    if "centers" in leaves:
        weights = weights * nothing.gaussian(leaves["centers"], HALF_WIDTH, scores.shape[2])
    results = {"context": weights @ memory, "weights": weights, "logsumexp": log}
    return results | {"scores": scores.masked_fill(~counts, -torch.inf)}


def call(name: str, leaves: Tensors, options: dict[str, Any], counts: Tensor) -> Tensors:
    """The results of a public function, with NaN in rows that it may not read."""
    operands = leaves | {"memory": nothing.spoil(leaves["memory"], counts)}
    centers = operands.pop("centers", None)
    if centers is not None:
        options = options | {"window": LocalWindow(centers, HALF_WIDTH, name in ATTENTIONS)}
    first, second = getattr(fused_attn, name)(**operands, **options)
    names = ("context", "weights") if name in ATTENTIONS else ("scores", "logsumexp")
    results = zip(names, (first, second), strict=True)
    return {key: tensor for key, tensor in results if tensor is not None}


def step(name: str, leaves: Tensors, options: dict[str, Any], counts: Tensor) -> Tensors:
    """The same for one step, a query without the T dimension."""
    alone = {key: leaf.squeeze(1) for key, leaf in leaves.items() if key in ("query", "centers")}
    found = call(name, leaves | alone, options, counts)
    return {key: tensor.unsqueeze(1) for key, tensor in found.items()}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    """Every size and mask; some with one step, windows, named backends and without weights."""
    rng, function = random.Random(name), getattr(fused_attn, name)
    parameters = inspect.signature(function).parameters
    for shape, (lengths, mask) in nothing.some_masks(rng, 5):
        leaves = operands_of(function, shape)
        if rng.random() < 0.3:
            leaves["centers"] = nothing.draw("centers", *shape[:2]).requires_grad_()
        options: dict[str, Any] = {
            "memory_lengths": nothing.lengths_of(lengths, shape[0], shape[2]),
            "memory_mask": nothing.mask_of(mask, *shape),
        }
        counts = nothing.counted(shape, *options.values(), leaves.get("centers"), HALF_WIDTH)
        for key, values in (("return_weights", (True, False)), ("backend", ("auto", "eager"))):
            if key in parameters:
                options[key] = rng.choice(values)
        run = step if shape[1] == 1 and rng.random() < 0.5 else call
        about = (name, run.__name__, shape, leaves.keys(), options)
        results, expected = run(name, leaves, options, counts), right(leaves, counts)
        seeds = {key: nothing.draw(f"grad {key}", *t.shape) for key, t in results.items()}
        nothing.compare(results, expected, about)
        grads = (nothing.gradients(found, leaves, seeds) for found in (results, expected))
        nothing.compare(*grads, about)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivatives(name: str) -> None:
    for shape in nothing.BATCHES:
        leaves = operands_of(getattr(fused_attn, name), shape)
        lengths = nothing.lengths_of("mixed", shape[0], shape[2])
        counts = nothing.counted(shape, lengths, None)
        found = call(name, leaves, {"memory_lengths": lengths}, counts)
        second = [
            nothing.gradients({"loss": squared_gradient(results, found, leaves)}, leaves, LOSS)
            for results in (found, right(leaves, counts))
        ]
        nothing.compare(*second, (name, shape))


LOSS = {"loss": torch.ones(())}


def squared_gradient(results: Tensors, wanted: Tensors, leaves: Tensors) -> Tensor:
    """A loss on the first derivatives of a nonlinear loss."""
    finite = [results[name].masked_fill(results[name].isinf(), 0.0) for name in wanted]
    loss = sum(tensor.square().sum() for tensor in finite)
    rest = {"create_graph": True, "materialize_grads": True}
    return sum(g.square().sum() for g in torch.autograd.grad(loss, list(leaves.values()), **rest))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_widths_of_0_are_refused(name: str) -> None:
    """The error names the argument, what was expected and what was given."""
    function = getattr(fused_attn, name)
    given = operands_of(function, (2, 3, 4))
    for key, axis in (("memory", 2), ("weight", 0), ("query_weight", 1), ("v", 0)):
        if key in given:
            index = torch.zeros(0, dtype=torch.int64)
            wrong = given | {key: given[key].index_select(axis, index)}
            with pytest.raises(ValueError, match=rf"{key} must have shape .*, got \(.*0"):
                function(**wrong)


def test_sparsemax() -> None:
    for shape in nothing.BATCHES:
        for mask in (None, "shared", "row", "cube"):
            # 0.7 x quarters: no score is on the edge of a support, where there is no gradient.
            scores = (0.7 * nothing.draw("scores", *shape)).requires_grad_()
            given = None if mask is None else nothing.mask_of(mask, *shape)
            if mask == "shared":  # masks only have to broadcast
                given = given[:, None]
            everything = nothing.counted(shape, None, given)
            expected = {"weights": nothing.sparsemax(scores, everything)}
            results, leaves = {"weights": sparsemax(scores, given)}, {"scores": scores}
            seeds = {"weights": nothing.draw("grad", *shape)}
            nothing.compare(results, expected, (shape, mask))
            grads = (nothing.gradients(found, leaves, seeds) for found in (results, expected))
            nothing.compare(*grads, (shape, mask))
    assert sparsemax(torch.zeros(0)).shape == (0,)
    assert torch.equal(sparsemax(torch.ones(1)), torch.ones(1))


def test_coverage_loss() -> None:
    for batch, queries, source in nothing.BATCHES:
        weights = nothing.draw("weights", batch, queries, source).abs().requires_grad_()
        before = nothing.draw("before", batch, source).abs()
        losses = torch.zeros(batch, queries).double()
        seen = before.clone()
        for t in range(queries):
            losses[:, t] = torch.minimum(weights[:, t], seen).sum(dim=-1)
            seen = seen + weights[:, t]
        found = coverage_loss(weights, before)
        nothing.compare({"loss": found}, {"loss": losses}, weights.shape)
        grad = torch.autograd.grad(found.sum(), weights)[0]
        assert grad.shape == weights.shape and grad.isfinite().all()
        assert coverage_loss(weights).shape == (batch, queries)
