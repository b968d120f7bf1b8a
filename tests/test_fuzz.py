"""The native kernels on random calls, against the float64 oracle, within the usual error budget.

Sizes, strides, masks, dtypes and numbers of threads are random, with NaN wherever nothing may be
read. The same calls also run through the dispatcher, and composed of ATen operators as under
torch.func. `make test-fuzz` draws many more, differently in each run; conftest.py has both
profiles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from targets import TARGETS, Target
from torch import Tensor

from fused_attn import autograd, functional, ragged, routes, testing
from fused_attn.prepared import exponentials
from fused_attn.reference import Masking
from fused_attn.testing import DTYPES, MASKS, SCORES, Case, Inputs, Tensors

CPU_TARGETS = [target for target in TARGETS if getattr(target, "backend", None) == "cpu"]
NOT_FINITE = (torch.nan, torch.inf, -torch.inf)
# The layouts of `testing.lay_out`, and views of a larger tensor, of columns, of one row.
LAYOUTS = (*testing.LAYOUTS, "window", "columns", "broadcast")
REPEATED = ("expanded", "broadcast")  # several rows share the same memory
ARGUMENTS = {
    "dot": ("query", "memory"),
    "general": ("query", "memory", "weight"),
    "concat": ("query", "memory", "query_weight", "memory_weight", "v", "bias"),
    "projected": ("query_proj", "memory_proj", "memory", "v", "memory_exp"),
}
OTHERS = ("memory_lengths", "memory_mask", "keep_mask", "grad_context", "grad_weights")

# `sampled_from` draws uniformly, while `integers` favours small numbers. Multiples of 8 fill
# vectors.
WIDTHS = st.sampled_from((*range(1, 81), *range(8, 81, 8)))
BATCHES = st.sampled_from((*range(1, 5), *range(5)))
QUERIES = st.one_of(st.just(1), st.sampled_from(range(71)))
SOURCES = st.sampled_from(range(151))
# Large sizes: several segments of the source, tiles and their tails, every remainder modulo 32.
LARGE_WIDTHS = st.sampled_from((*range(33, 1001), *range(64, 1001, 32)))
LARGE_SOURCES = st.sampled_from(range(200, 2501))
LARGE_QUERIES = st.sampled_from((1, 2, 7, 8, *range(9, 41)))
# Limits on the work of the oracle for one call: multiply-adds, or evaluations of tanh.
LARGEST = {"dot": 6_000_000, "general": 6_000_000, "concat": 1_500_000, "projected": 1_500_000}

pytestmark = pytest.mark.skipif(not CPU_TARGETS, reason="the cpu backend is not usable here")


@dataclass(frozen=True)
class Call:
    """A compact description of a call for Hypothesis to print. `inputs` draws from its seed."""

    case: Case
    lengths: tuple[int, ...] | None
    density: float  # the fraction of True in the mask
    layouts: dict[str, str]  # by argument; contiguous for arguments that are not listed
    prepared: bool  # the exponentials of the memory projection are precomputed
    poison: float  # the value in memory rows that are masked for all queries
    threads: int
    seed: int

    def laid_out(self, name: str, tensor: Tensor | None) -> Any:
        return None if tensor is None else lay_out(tensor, self.layouts.get(name, "contiguous"))

    def inputs(self) -> Inputs:
        drawn = testing.make_inputs(self.case, self.seed)
        _, mask, keep, keep_scale, window = drawn.masking
        if mask is not None:
            generator = torch.Generator().manual_seed(self.seed)
            mask = torch.rand(mask.shape, generator=generator) < self.density
        lengths = None if self.lengths is None else torch.tensor(self.lengths, dtype=torch.int64)
        masks = (lengths, mask, keep)
        return replace(
            drawn,
            tensors={name: self.laid_out(name, t) for name, t in drawn.tensors.items()},
            masking=Masking(*map(self.laid_out, OTHERS, masks), keep_scale, window),
            grad_context=self.laid_out("grad_context", drawn.grad_context),
            grad_weights=self.laid_out("grad_weights", drawn.grad_weights),
        )

    def run(self, target: Target, inputs: Inputs) -> Tensors:
        torch.set_num_threads(self.threads)
        if not self.prepared:
            return target.run(inputs)
        memory_exp = exponentials(inputs.tensors["memory_proj"])
        if self.layouts.get("memory_exp") not in REPEATED:
            memory_exp = self.laid_out("memory_exp", memory_exp)
        mask = inputs.masking.memory_mask
        if mask is not None and mask.dim() == 2:
            inputs = replace(inputs, masking=inputs.masking._replace(memory_mask=mask[:, None]))

        def call(tensors: Tensors) -> tuple[Tensor, Tensor | None]:
            operands = (tensors["query_proj"], tensors["memory_proj"], memory_exp, tensors["v"])
            rest = (inputs.masking, inputs.grad_weights is not None, target.backend)
            return functional.attend_concat(*operands, tensors["memory"], *rest)

        with target.active(), testing.poisoned_empty():
            return testing.evaluate(call, inputs)


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values with other strides; repeated layouts use the first row for all."""
    if layout == "window":  # surrounded by NaN, or True in a mask
        whole = torch.full([size + 3 for size in tensor.shape], torch.nan).to(tensor.dtype)
        view = whole[tuple(slice(2, 2 + size) for size in tensor.shape)]
        return view.copy_(tensor)
    if layout == "columns" and tensor.dim() > 1:
        return tensor.mT.contiguous().mT
    if layout == "broadcast" and tensor.dim() > 1:
        return tensor[:1, :1].clone().expand_as(tensor) if tensor.dim() > 2 else tensor
    return testing.lay_out(tensor, layout)


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, ...]:
    """(B, T, S, D, E, A)."""
    widths = (draw(WIDTHS), draw(WIDTHS), draw(WIDTHS))
    return draw(BATCHES), draw(QUERIES), draw(SOURCES), *widths


@st.composite
def large_sizes(draw: st.DrawFn, score: str) -> tuple[int, ...]:
    """Large sizes. Queries, score width and source are reduced if the oracle would be too slow."""
    source, width, queries = draw(LARGE_SOURCES), draw(LARGE_WIDTHS), draw(LARGE_QUERIES)
    scored = draw(LARGE_WIDTHS) if score in ("concat", "projected") else width
    most = LARGEST[score]
    queries = max(min(queries, most // (source * scored)), min(queries, 9))
    if queries * source * scored > most and score in ("concat", "projected"):
        scored = scored % 32 + 32 * max(1, most // (queries * source * 32) - 1)
    source = max(min(source, most // (queries * scored)), 200)
    batch = draw(st.integers(1, max(1, min(4, most // (queries * source * scored)))))
    return batch, queries, source, draw(WIDTHS), width, scored


@st.composite
def calls(
    draw: st.DrawFn,
    score: str,
    mask: str | None = None,
    shapes: st.SearchStrategy[tuple[int, ...]] | None = None,
) -> Call:
    options = {name: draw(st.booleans()) for name in ("lengths", "keep", "bias", "weights")}
    case = Case(
        score,
        draw(st.sampled_from(DTYPES)),
        *draw(sizes() if shapes is None else shapes),
        mask=mask or draw(st.sampled_from(MASKS)),
        window="none" if mask else draw(st.sampled_from(("none", "none", "hard"))),
        **options,
    )
    lengths = st.lists(st.integers(0, case.source), min_size=case.batch, max_size=case.batch)
    names = st.sampled_from((*ARGUMENTS[score], *OTHERS))
    return Call(
        case,
        tuple(draw(lengths)) if case.lengths else None,
        draw(st.sampled_from((0.5, 1.0, 0.9, 0.05, 0.0))),
        draw(st.dictionaries(names, st.sampled_from(LAYOUTS))),
        score == "projected" and draw(st.booleans()),
        draw(st.sampled_from(NOT_FINITE)),
        draw(st.integers(1, 3)),
        draw(st.integers(0, 2**16)),
    )


def score_gradient_size(inputs: Inputs, summed: Tensor, weights: Tensor, power: int) -> Tensor:
    """The size (B, T, S) of w (dW - sum w dW), where dW is the gradient of the weights."""
    memory, grad_context = inputs.tensors["memory"].double(), inputs.grad_context.double().abs()
    size = product(grad_context, memory.abs().mT, power)
    if inputs.masking.keep_mask is not None:
        size = size * inputs.masking.keep_mask * inputs.masking.keep_scale
    if inputs.grad_weights is not None:
        size = size + inputs.grad_weights.abs()
    mean = (weights * size).sum(dim=-1, keepdim=True)
    if inputs.grad_context.dtype.itemsize == 2:
        # The mean is computed from the stored context, whose values are rounded to 16 bits.
        mean = mean + (grad_context * (summed @ memory).abs()).sum(dim=-1, keepdim=True)
    return weights * (size + mean)


def product(x: Tensor, y: Tensor, power: int) -> Tensor:
    return (x**power @ y**power) ** (1 / power)


def gradient_sizes(inputs: Inputs, weights: Tensor) -> dict[str, float]:
    """By name, the size of a gradient if the terms of its sums have random signs.

    It is the scale of the budget's floor. A gradient can be much smaller if few positions count, if
    all rows are equal, or by chance if a width is 1. Its terms are still rounded.
    """
    tensors = {name: tensor.double().abs() for name, tensor in inputs.tensors.items()}
    keep, keep_scale = inputs.masking[2:4]
    summed = weights if keep is None else weights * keep * keep_scale
    # For equal rows all terms cancel: use plain sums.
    rows = [inputs.tensors[name] for name in ("memory", "memory_proj") if name in tensors]
    power = 1 if any(tensor.stride(1) == 0 for tensor in rows) else 2
    size = score_gradient_size(inputs, summed, weights, power)
    by_value = product(summed.mT, inputs.grad_context.double().abs(), power)

    def of_weight(x: Tensor, y: Tensor) -> Tensor:
        return product(x.flatten(0, 1).mT, y.flatten(0, 1), power)

    if inputs.score == "dot":
        keys = product(size.mT, tensors["query"], power)
        sizes = {"query": product(size, tensors["memory"], power), "memory": by_value + keys}
    elif inputs.score == "general":
        projected = inputs.tensors["query"].double() @ inputs.tensors["weight"].double()
        grad_projected = product(size, tensors["memory"], power)
        sizes = {
            "memory": by_value + product(size.mT, projected.abs(), power),
            "query": product(grad_projected, tensors["weight"].mT, power),
            "weight": of_weight(tensors["query"], grad_projected),
        }
    else:  # tanh and its derivative are at most 1
        queries = torch.linalg.vector_norm(size, power, dim=2)[..., None] * tensors["v"]
        keys = torch.linalg.vector_norm(size, power, dim=1)[..., None] * tensors["v"]
        sizes = {"v": torch.linalg.vector_norm(size, power)[None]}
        if inputs.score == "projected":
            sizes |= {"memory": by_value, "query_proj": queries, "memory_proj": keys}
        else:
            sizes |= {
                "memory": by_value + product(keys, tensors["memory_weight"], power),
                "query": product(queries, tensors["query_weight"], power),
                "query_weight": of_weight(queries, tensors["query"]),
                "memory_weight": of_weight(keys, tensors["memory"]),
                "bias": torch.linalg.vector_norm(queries, power, dim=(0, 1)),
            }
    return {name: largest(size) for name, size in sizes.items()}


def largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def budget_scales(inputs: Inputs, oracle: Tensors) -> dict[str, float]:
    sizes = gradient_sizes(inputs, oracle["weights"])
    return {
        f"grad_{name}": max(largest(oracle[f"grad_{name}"]), sizes[name]) for name in inputs.tensors
    }


def right_answers(inputs: Inputs) -> tuple[Tensors, Tensors, dict[str, float]]:
    """The results of the oracle and of plain attention, and the scales of the budget."""
    if inputs.grad_weights is not None:
        oracle = testing.oracle(inputs)
        return oracle, testing.plain(inputs), budget_scales(inputs, oracle)
    shape = (*inputs.grad_context.shape[:2], inputs.tensors["memory"].shape[1])
    asked = testing.oracle(replace(inputs, grad_weights=torch.zeros(shape)))
    scales = budget_scales(inputs, asked)
    oracle = {name: t for name, t in asked.items() if name != "weights"}
    return oracle, testing.plain(inputs), scales


def spoiled(call: Call, inputs: Inputs) -> Inputs:
    """The inputs with poison in memory rows that are masked for all queries, in the same layout."""
    poisoned = testing.spoil_padding(inputs, call.poison)
    tensors = {
        name: call.laid_out(name, tensor)
        # Rows that share memory cannot be poisoned individually.
        if name in ("memory", "memory_proj") and call.layouts.get(name) not in REPEATED
        else inputs.tensors[name]
        for name, tensor in poisoned.tensors.items()
    }
    return replace(poisoned, tensors=tensors)


@pytest.mark.parametrize("score", SCORES)
@given(data=st.data())
def test_drawn_calls(score: str, data: st.DataObject) -> None:
    call = data.draw(calls(score))
    inputs = call.inputs()
    oracle, plain, scales = right_answers(inputs)
    poisoned = spoiled(call, inputs)
    for target in CPU_TARGETS:  # the oracle costs more than the kernels
        testing.check_results(call.run(target, poisoned), oracle, plain, scales)
    for way in (routes.OPERATOR, routes.COMPOSED):
        chosen = {"route": lambda way=way: way}
        with mock.patch.multiple(autograd, **chosen), mock.patch.multiple(ragged, **chosen):
            testing.check_results(call.run(CPU_TARGETS[0], poisoned), oracle, plain, scales)


@pytest.mark.parametrize("score", SCORES)
@settings(max_examples=settings.default.max_examples // 4)
@given(data=st.data())
def test_drawn_large_calls(score: str, data: st.DataObject) -> None:
    call = data.draw(calls(score, shapes=large_sizes(score)))
    inputs = call.inputs()
    oracle, plain, scales = right_answers(inputs)
    for target in CPU_TARGETS:
        testing.check_results(call.run(target, inputs), oracle, plain, scales)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # from `flags`, about GPUs
@pytest.mark.parametrize("score", SCORES)
@given(data=st.data())
def test_a_row_spoils_only_who_looks_at_it(score: str, data: st.DataObject) -> None:
    """A value of one memory row is not finite. Half of its sequence's queries attend to the row."""
    call = data.draw(calls(score, mask="cube"))
    batch, source = max(call.case.batch, 1), max(call.case.source, 1)
    queries = max(call.case.queries, 2)
    sizes = {"batch": batch, "queries": queries, "source": source}
    case = replace(call.case, **sizes, lengths=False, weights=True)
    call = replace(call, layouts={}, lengths=None, case=case)
    b, s = data.draw(st.integers(0, batch - 1)), data.draw(st.integers(0, source - 1))
    parity = data.draw(st.integers(0, 1))
    clean = call.inputs()
    clean.masking.memory_mask[b, :, s] = torch.arange(queries) % 2 == parity
    oracle, plain, scales = right_answers(clean)
    name = data.draw(st.sampled_from(sorted({"memory", "memory_proj"} & clean.tensors.keys())))
    bad = clean.tensors[name].clone()
    bad[b, s, data.draw(st.integers(0, bad.shape[2] - 1))] = call.poison
    inputs = replace(clean, tensors=clean.tensors | {name: bad})
    counts = testing.counted(clean)
    looks = torch.zeros(batch, queries, dtype=torch.bool)
    looks[b] = counts[b, :, s]
    met = (counts & looks[..., None]).any(dim=1)  # rows that share a query with the bad row
    met[b, s] = True  # the gradient of the bad row depends on its values
    query = "grad_query_proj" if score == "projected" else "grad_query"
    spared = {"context": ~looks, "weights": ~looks, query: ~looks}
    spared |= {f"grad_{name}": ~met for name in ("memory", "memory_proj") if name in clean.tensors}
    for target in CPU_TARGETS:
        # With AMX, oneDNN's bfloat16 matrix product carries a NaN from one row into the next
        # (DESIGN, known limits). That concerns the projections, and this tests our operators.
        with torch.backends.mkldnn.flags(enabled=False):
            got = call.run(target, inputs)
        assert got["context"][looks].isnan().all()
        for result, where in spared.items():
            testing.check_within_budget(
                result, got[result][where], oracle[result][where], plain[result][where],
                scales.get(result),
            )  # fmt: skip
