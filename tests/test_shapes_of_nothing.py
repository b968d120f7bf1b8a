"""Sizes of 0 and 1 and fully masked rows, in the operators of every backend."""

from __future__ import annotations

import random
from collections.abc import Iterable
from contextlib import nullcontext
from itertools import product
from typing import Any

import nothing
import pytest
import torch
from nothing import Call, Tensors
from targets import TARGETS, Target, every_target
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fused_attn import autograd, functional, ragged, testing
from fused_attn.prepared import exponentials
from fused_attn.reference import LocalWindow, Masking, arithmetic_dtype

OPERATORS = torch.ops.fused_attn
RESULTS = ("context", "weights", "logsumexp")


def leaves_of(call: Call, device: str, dtype: torch.dtype) -> Tensors:
    """The arguments, with NaN in rows that may not be read."""
    counts, leaves = call.counts, {}
    for name, tensor in call.tensors().items():
        kind = arithmetic_dtype(dtype) if name == "centers" else dtype
        tensor = nothing.spoil(tensor, counts) if name in ("memory", "memory_proj") else tensor
        leaves[name] = tensor.to(device, kind).requires_grad_()
    return leaves


def masking_of(call: Call, leaves: Tensors) -> Masking:
    memory, window = leaves["memory"], None
    lengths, mask, keep, centers = (None if t is None else t.to(memory.device) for t in call.masks)
    if centers is not None:
        centers = leaves.get("centers", centers.to(arithmetic_dtype(memory.dtype)))
        window = LocalWindow(centers, call.half_width, call.window == "gaussian")
    return Masking(lengths, mask, keep, nothing.KEEP_SCALE if call.keep else 1.0, window)


def attend(call: Call, leaves: Tensors, exps: Tensor | None, backend: str) -> Tensors:
    """The results that get a gradient."""
    rest = (masking_of(call, leaves), "weights" in call.seeds, backend)
    if call.score == "dot":
        operands = (leaves["query"], leaves["memory"], nothing.SCALE)
        context, weights = functional.attend_dot(*operands, *rest)
    else:
        query, proj, v = (leaves[name] for name in ("query", "memory_proj", "v"))
        context, weights = functional.attend_concat(query, proj, exps, v, leaves["memory"], *rest)
    assert (weights is not None) == ("weights" in call.seeds)
    return {"context": context} | ({} if weights is None else {"weights": weights})


def operator(call: Call, leaves: Tensors, exps: Tensor | None, backend: str) -> Tensors:
    """All results of the operator, without a graph."""
    lengths, mask, keep, keep_scale, window = masking_of(call, leaves)
    names = ("centers", "half_width", "gaussian")
    options: dict[str, Any] = {} if window is None else dict(zip(names, window, strict=True))
    options |= {"memory_lengths": lengths, "memory_mask": mask, "keep_mask": keep}
    options |= {"keep_scale": keep_scale, "return_weights": True, "return_logsumexp": True}
    options |= {"backend": backend}
    inputs = {name: leaf for name, leaf in leaves.items() if name != "centers"}
    with torch.no_grad():
        if call.score == "dot":
            found = OPERATORS.dot_attention(**inputs, **options, scale=nothing.SCALE)
        else:
            inputs["query_proj"] = inputs.pop("query")
            found = OPERATORS.concat_attention(**inputs, **options, memory_exp=exps)
    return dict(zip(RESULTS, found, strict=True))


def few(calls: Iterable[Any], target: Target) -> list[Any]:
    """All calls; every second one for each instruction set, one in 37 if interpreted."""
    step = 37 if target.is_interpreted else 1 if target.isa is None else 2
    return list(calls)[TARGETS.index(target) % step :: step]


def supported(target: Target) -> list[torch.dtype]:
    return [dtype for dtype in testing.DTYPES if not target.refusals(testing.Case("dot", dtype))]


@every_target
@pytest.mark.parametrize("score", ["dot", "concat"])
def test_attention(target: Target, score: str) -> None:
    rng = random.Random(f"{score} {target}")
    with target.active(), testing.poisoned_empty():
        for call in few(nothing.operator_calls(score), target):
            dtype, is_prepared = rng.choice(supported(target)), rng.random() < 0.3
            leaves, expected = leaves_of(call, target.device, dtype), nothing.right(call)
            exps = exponentials(leaves["memory_proj"]) if is_prepared and score != "dot" else None
            results = attend(call, leaves, exps, target.backend)
            results |= nothing.gradients(results, leaves, call.seeds_of())
            about = (call, dtype, is_prepared)
            nothing.compare(results, expected, about)
            found = operator(call, leaves, exps, target.backend)
            # bfloat16 exponentials are not more accurate than that.
            nothing.compare(found, expected, about, dtype if is_prepared else None)


@every_target
def test_concat_scores(target: Target) -> None:
    rng = random.Random(f"scores {target}")
    calls = product(nothing.BATCHES, nothing.MASKINGS)
    with target.active(), testing.poisoned_empty():
        for sizes, masks in few(calls, target):
            widths = (1, rng.choice((1, 5)))
            call = Call("concat", *sizes, *widths, *masks, seeds=("scores",))
            dtype, is_prepared = rng.choice(supported(target)), rng.random() < 0.3
            leaves, expected = leaves_of(call, target.device, dtype), nothing.right(call)
            query, proj, v = (leaves[name] for name in ("query", "memory_proj", "v"))
            exps = exponentials(proj) if is_prepared else None
            lengths, mask, *_ = masking_of(call, leaves)
            found = autograd.concat_scores(query, proj, exps, v, lengths, mask, target.backend)
            assert found.dtype == arithmetic_dtype(dtype)
            about, results = (call, dtype, is_prepared), {"scores": found}
            nothing.compare(results, expected, about, dtype if is_prepared else None)
            del leaves["memory"]
            grads = nothing.gradients(results, leaves, call.seeds_of())
            nothing.compare(grads, expected, about, dtype)


ROWS = ((), (0,), (3,), (0, 0), (0, 2, 0), (2, 0, 1))


@every_target
@pytest.mark.parametrize("score", ["dot", "concat"])
def test_rows_of_sequences(target: Target, score: str) -> None:
    """A memory (N, E) with offsets: no sequences, empty ones, or max_source above the longest."""
    rng = random.Random(f"{score} rows {target}")
    backend = target.backend
    sizes = product(ROWS, (*nothing.SIZES, 9), (0, 2), (1, 19), (False, True))
    with target.active(), testing.poisoned_empty():
        for lengths, queries, slack, width, wanted in few(sizes, target):
            source, about = max(lengths, default=0) + slack, (lengths, queries, slack, width)
            score_width = width if score == "dot" else rng.choice((1, 5))
            call = Call(score, len(lengths), queries, source, width, score_width)
            whole, dtype = call.tensors(), rng.choice(supported(target))
            for name in {"memory", "memory_proj"} & whole.keys():
                whole[name] = nothing.draw(name, sum(lengths), whole[name].shape[-1])
            expected = rows_right(call, whole, lengths, wanted)
            leaves = {
                name: t.to(target.device, dtype).requires_grad_() for name, t in whole.items()
            }
            offsets = torch.tensor([0, *lengths], device=target.device).cumsum(0)
            rows = ragged.Rows(leaves["memory"], offsets, source)
            if score == "dot":
                rest = (rows, nothing.SCALE, wanted, backend)
                context, weights = ragged.attend_dot(leaves["query"], *rest)
            else:
                operands = (leaves["query"], leaves["memory_proj"], leaves["v"])
                context, weights = ragged.attend_concat(*operands, rows, wanted, backend)
            results = {"context": context} | ({} if weights is None else {"weights": weights})
            seeds = {name: call.seeds_of()[name] for name in results}
            nothing.compare(results | nothing.gradients(results, leaves, seeds), expected, about)


def rows_right(call: Call, tensors: Tensors, lengths: tuple[int, ...], wanted: bool) -> Tensors:
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    memory = nothing.padded(leaves["memory"], lengths, call.source)
    if call.score == "dot":
        scores = nothing.SCALE * (leaves["query"] @ memory.mT)
    else:
        keys = nothing.padded(leaves["memory_proj"], lengths, call.source)
        scores = nothing.additive(leaves["query"], keys, leaves["v"])
    bounds = torch.tensor(lengths, dtype=torch.int64)
    weights, _ = nothing.softmax(scores, nothing.counted(call.shape, bounds, None))
    results = {"context": weights @ memory, "weights": weights}
    seeds = {name: s for name, s in call.seeds_of().items() if wanted or name == "context"}
    return results | nothing.gradients(results, leaves, seeds)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_operators_refuse_widths_of_0(backend: str) -> None:
    """query, memory and v may not have width 0, and max_source has an upper limit."""
    q, m, none, lse = torch.ones(2, 3, 0), torch.ones(2, 4, 0), torch.ones(0), torch.ones(2, 3)
    q5, m5, v5 = torch.ones(2, 3, 5), torch.ones(2, 4, 5), torch.ones(5)
    rest = {"backend": backend}
    dot, dot_backward = OPERATORS.dot_attention, OPERATORS.dot_attention_backward
    concat, concat_backward = OPERATORS.concat_attention, OPERATORS.concat_attention_backward
    scores, scores_backward = OPERATORS.concat_scores, OPERATORS.concat_scores_backward
    for call in (
        lambda: dot(q, m, **rest),
        lambda: dot_backward(q, None, None, q, m, q, None, lse, [True] * 3, **rest),
        lambda: concat(q, m, None, none, m, **rest),
        lambda: concat(q, m, None, none, m5, **rest),
        lambda: concat(q5, m5, None, v5, m, **rest),
        lambda: concat_backward(
            q5, None, None, q, m, None, none, m5, q5, None, lse, [True] * 5, **rest
        ),
        lambda: concat_backward(
            q, None, None, q5, m5, None, v5, m, q, None, lse, [True] * 5, **rest
        ),
        lambda: scores(q, m, None, none, **rest),
        lambda: scores_backward(torch.ones(2, 3, 4), q, m, None, none, [True] * 3, **rest),
    ):
        with pytest.raises(ValueError, match=r">= 1|at least 1"):
            call()
    rows, offsets = torch.ones(4, 5), torch.tensor([0, 3, 4])
    for longest in (2**63 - 1, -1):
        with pytest.raises((ValueError, RuntimeError), match=r"max_source|offsets|rows"):
            dot(q5, rows, offsets, max_source=longest, **rest)
        with pytest.raises((ValueError, RuntimeError), match=r"max_source|offsets|rows"):
            concat(q5, rows, None, v5, rows, offsets, max_source=longest, **rest)


@pytest.mark.parametrize("score", ["dot", "concat"])
@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_tensors_without_values_have_the_same_shapes(kind: str, score: str) -> None:
    """Under fake tensors, as in a compiler: results, and gradients of every input."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for number, sizes in enumerate(nothing.BATCHES):
        call = Call(score, *sizes, 5, 5, *(("none", "none"), ("full", "cube"))[number % 2])
        leaves, expected = leaves_of(call, "cpu", torch.float32), nothing.right(call)
        if kind == "meta":
            leaves = {n: t.detach().to("meta").requires_grad_() for n, t in leaves.items()}
        else:
            leaves = {name: mode.from_tensor(leaf) for name, leaf in leaves.items()}
        with mode if kind == "fake" else nullcontext():
            results = attend(call, leaves, None, "auto")
            results |= nothing.gradients(results, leaves, call.seeds_of())
        found = {name: tensor.shape for name, tensor in results.items()}
        assert found == {name: expected[name].shape for name in found}, call
