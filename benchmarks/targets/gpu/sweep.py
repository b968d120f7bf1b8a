"""The stage "sweep": candidates for the launch table, each compiled and checked, then timed.

A candidate is a plan in place of the table's. What fails to compile, needs too much shared memory
or computes something else is a line like any other, and is not timed.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from fused_attn.kernels import launch
from torch import Tensor

from benchmarks.targets.gpu import kernels as gpu_kernels
from benchmarks.targets.gpu import lines as gpu_lines
from benchmarks.targets.gpu import measure as gpu_measure
from benchmarks.targets.gpu import rows as gpu_rows
from benchmarks.targets.gpu.cases import CHIP
from benchmarks.targets.gpu.pool import Phase
from benchmarks.targets.gpu.rows import Row
from fused_attn import backends
from fused_attn.testing import Inputs

PHASES = (
    Phase("compile", jobs=14, limit_s=60.0, share=0.7),
    Phase("times", jobs=1, limit_s=20.0),
)
TABLE = "table"
BUDGET_S = 0.03  # of the clock for a candidate
TOLERANCE = 0.02  # of the largest value, between two orders of summing in bfloat16
REGISTERS = 200  # of a thread for its part of the accumulator, at most


@dataclass(frozen=True)
class Target:
    """A call of one plan function, whose plan is replaced."""

    plan: str  # "forward", "backward", "context_columns", "source_gradients", "concat_gradients"
    row: Row

    def __str__(self) -> str:
        return f"{self.plan} {self.row}"

    @property
    def wanted(self) -> list[bool]:
        """The gradients: those that the planned kernel makes, alone where that is possible."""
        if self.row.score == "concat":
            return [self.plan == "concat_gradients"] * 3 + [self.plan != "concat_gradients", False]
        return [True, self.plan == "source_gradients", False]

    @property
    def name(self) -> str:
        """Of the backend's function."""
        return "forward" if self.plan in ("forward", "context_columns") else "backward"


def _target(plan: str, score: str, batch: int, queries: int, source: int, width: int) -> Target:
    return Target(plan, Row(score, batch, queries, source, width))


# In the order of how much hangs on them.
TARGETS = (
    _target("forward", "dot", 64, 64, 1024, 512),
    _target("backward", "dot", 64, 64, 1024, 512),
    _target("forward", "dot", 64, 64, 1024, 1024),
    _target("context_columns", "dot", 64, 64, 1024, 1024),
    _target("backward", "dot", 64, 64, 1024, 1024),
    _target("forward", "dot", 64, 1, 1024, 512),
    _target("forward", "concat", 64, 64, 1024, 512),
    _target("backward", "concat", 64, 64, 1024, 512),
    _target("concat_gradients", "concat", 64, 64, 1024, 512),
    _target("source_gradients", "dot", 64, 64, 1024, 512),
    _target("forward", "dot", 64, 5, 1024, 512),
    _target("forward", "dot", 64, 5, 1024, 1024),
    _target("forward", "concat", 64, 1, 1024, 512),
    _target("forward", "dot", 128, 10, 128, 1024),
    _target("backward", "dot", 128, 10, 128, 1024),
    _target("forward", "dot", 64, 50, 50, 512),
    _target("backward", "dot", 64, 50, 50, 512),
    _target("forward", "dot", 32, 40, 200, 512),
    _target("backward", "dot", 32, 40, 200, 512),
    _target("forward", "dot", 16, 30, 300, 1000),
    _target("backward", "dot", 16, 30, 300, 1000),
    _target("forward", "dot", 64, 64, 512, 512),
    _target("source_gradients", "dot", 64, 64, 1024, 1024),
    _target("forward", "dot", 8, 1, 200, 512),
    _target("forward", "dot", 64, 1, 1024, 1024),
    _target("forward", "dot", 64, 64, 1024, 256),
    _target("backward", "dot", 64, 64, 1024, 256),
    _target("forward", "dot", 64, 64, 1024, 128),
    _target("backward", "dot", 64, 64, 1024, 128),
)


def _cut(source: int, block: int, wanted: int) -> tuple[int, int]:
    """Splits of whole blocks and their segment, as the table cuts."""
    segment = block * max(1, launch.cdiv(launch.cdiv(source, block), wanted))
    return launch.cdiv(source, segment), segment


def _online(row: Row, is_backward: bool) -> Iterator[launch.Plan]:
    """What fits into shared memory and registers."""
    width = launch.power_of_2(row.width, 16)
    longest = min(launch.power_of_2(row.queries, 16), 64)
    all_t = sorted({longest, max(longest // 2, 16), 16 if width >= 1024 else longest})
    all_s = (32, 64, 128) if width <= 256 else (16, 32, 64)
    all_stages = (1, 2, 3) if width >= 1024 else (2, 3)
    for block_t, block_s, warps, stages in itertools.product(all_t, all_s, (4, 8), all_stages):
        held = block_t * (2 if is_backward else 1) + stages * block_s
        registers = block_t * max(width, block_s) / (32 * warps)
        if 2 * width * held > CHIP.shared_memory - 8192 or not 16 <= registers <= REGISTERS:
            continue
        if block_s > launch.power_of_2(row.source, 16):
            continue
        tiles = {"BLOCK_T": block_t, "BLOCK_S": block_s, "BLOCK_E": width}
        programs = row.batch * launch.cdiv(row.queries, block_t)
        wanted = (1, 2, 4) if programs <= CHIP.multiprocessors // 4 else (1, 2)
        for number in wanted if programs < CHIP.multiprocessors else (1,):
            splits, segment = _cut(row.source, block_s, number)
            if splits == number:
                yield launch.Plan("online", splits, segment, tiles, warps, stages)


def _rows(row: Row) -> Iterator[launch.Plan]:
    is_concat = row.score == "concat"
    longest_t = launch.power_of_2(row.queries, 16)
    longest_s = launch.power_of_2(row.source, 16)
    all_e = (32, 64) if is_concat else (64, 128)
    all_stages = (3,) if is_concat else (3, 4)
    blocks = itertools.product((16, 32, 64, 128), (16, 32, 64, 128, 256), all_e, (4, 8), all_stages)
    for block_t, block_s, block_e, warps, stages in blocks:
        elements = block_t * block_s / (32 * warps)
        if (
            block_t > longest_t
            or block_s > longest_s
            or not 8 <= elements <= (32 if is_concat else 64)
        ):
            continue
        if block_t < min(longest_t, 64) and block_s < 64 and row.source > 512:
            continue
        tiles = {"BLOCK_T": block_t, "BLOCK_S": block_s, "BLOCK_E": block_e}
        splits = launch.cdiv(row.source, block_s)
        regime = "rows" if splits == 1 else "columns"
        yield launch.Plan(regime, splits, block_s, tiles, warps, stages)


def _columns(row: Row) -> Iterator[launch.Plan]:
    longest_t = launch.power_of_2(row.queries, 16)
    blocks = itertools.product((32, 64, 128), (32, 64, 128), (64, 128, 256), (4, 8), (2, 3, 4))
    for block_t, block_s, block_e, warps, stages in blocks:
        held = stages * block_s * (2 * block_e + 2 * block_t)
        if block_t > longest_t or held > CHIP.shared_memory - 16384:
            continue
        if 16 <= block_t * block_e / (32 * warps) <= 128 and block_t * block_s / warps <= 1024:
            tiles = {"BLOCK_T": block_t, "BLOCK_S": block_s, "BLOCK_E": block_e}
            yield launch.Plan("columns", 1, block_s, tiles, warps, stages)


def _steps(row: Row) -> Iterator[launch.Plan]:
    width = launch.power_of_2(row.width, 16)
    own = plan_of(Target("forward", row)).splits
    blocks = itertools.product((2, 4, 8, 16), (2, 4, 8), (1, 2, 3, 4), (0.25, 0.5, 1, 2))
    for block_s, warps, stages, more in blocks:
        if not 16 <= block_s * width / (32 * warps) <= 64 or (stages not in (1, 3) and more != 0.5):
            continue
        splits, segment = _cut(row.source, block_s, max(1, int(own * more)))
        tiles = {"BLOCK_S": block_s, "BLOCK_E": width, "STAGES": stages}
        yield launch.Plan("step", splits, segment, tiles, warps)


def _source(row: Row) -> Iterator[launch.Plan]:
    blocks = itertools.product((32, 64), (32, 64, 128), (64, 128, 256), (4, 8), (2, 3))
    for block_t, block_s, block_e, warps, stages in blocks:
        tile = block_s * block_e / (32 * warps)
        held = stages * 2 * 2 * block_t * (block_s + block_e)
        if 32 <= tile <= 128 and held < CHIP.shared_memory:
            tiles = {"BLOCK_T": block_t, "BLOCK_S": block_s, "BLOCK_E": block_e}
            yield launch.Plan("source", 1, block_s, tiles, warps, stages)


def _gradients(row: Row) -> Iterator[launch.Plan]:
    blocks = itertools.product((16, 32), (16, 32, 64), (32, 64, 128), (2, 4, 8), (1,))
    for block_t, block_s, block_a, warps, stages in blocks:
        each = [block * block_a / (32 * warps) for block in (block_t, block_s)]
        if 4 <= min(each) and max(each) <= 32:
            tiles = {"BLOCK_T": block_t, "BLOCK_S": block_s, "BLOCK_A": block_a}
            yield launch.Plan("concat", 1, block_s, tiles, warps, stages)


def plan_of(target: Target) -> launch.Plan:
    """The table's own, on an H100 or H200."""
    row = target.row
    kind = launch.Kind(row.dtype == torch.float32, True, False)
    if target.plan == "source_gradients":
        return launch.source_gradients(row.width, kind)
    if target.plan == "concat_gradients":
        return launch.concat_gradients(row.width, kind)
    if target.plan == "context_columns":
        return launch.context_columns(CHIP, (row.batch, row.queries, row.source, row.width), kind)
    sizes = (row.batch, row.queries, row.source, row.width, row.width)
    return getattr(launch, target.plan)(CHIP, row.score, sizes, kind)


def candidates(target: Target) -> list[launch.Plan]:
    """Plans in place of the table's, which is not among them."""
    row = target.row
    if target.plan == "source_gradients":
        found = list(_source(row))
    elif target.plan == "concat_gradients":
        found = list(_gradients(row))
    elif target.plan == "context_columns":
        found = list(_columns(row))
    elif plan_of(target).regime == "step":
        found = list(_steps(row))
    elif row.score == "concat":
        found = list(_rows(row))
    else:
        found = list(_online(row, target.plan == "backward"))
        found += _rows(row)
    own = plan_of(target)
    return [plan for plan in found if label(plan) != label(own)]


def label(plan: launch.Plan) -> str:
    tiles = " ".join(f"{name[-1].lower()}{size}" for name, size in plan.tiles.items())
    rest = f"w{plan.num_warps} stages{plan.num_stages} x{plan.splits}"
    return f"{plan.regime} {tiles} {rest}"


@cache
def _items(device: str) -> dict[str, tuple[Target, launch.Plan | None]]:
    """By item. The table's plan comes first of each target; on a CPU small targets, and few."""
    found: dict[str, tuple[Target, launch.Plan | None]] = {}
    for target in TARGETS if device == "cuda" else _small():
        found[f"{target} | {TABLE}"] = (target, None)
        plans = candidates(target)
        for plan in plans if device == "cuda" else plans[:1]:
            found[f"{target} | {label(plan)}"] = (target, plan)
    return found


def _small() -> list[Target]:
    kinds = {(x.plan, x.row.score, x.row.queries == 1): x for x in TARGETS}.values()
    sizes: dict[str, Any] = {"batch": 2, "source": 140, "width": 32, "cold": False}
    return [replace(x, row=replace(x.row, queries=min(x.row.queries, 5), **sizes)) for x in kinds]


def items(phase: str, options: argparse.Namespace) -> list[str]:
    return list(_items(options.device))


@contextmanager
def overriding(name: str, plan: launch.Plan | None) -> Iterator[None]:
    """Within it a function of the launch table returns this plan, whatever it is asked for."""
    before = getattr(launch, name)
    if plan is not None:
        setattr(launch, name, lambda *_: plan)
    try:
        yield
    finally:
        setattr(launch, name, before)


Call = Callable[[], tuple[Tensor | None, ...]]


def call_of(target: Target, inputs: Inputs) -> Call:
    """The kernel as the backend calls it: no operator, no autograd between."""
    backend: Any = backends.load("triton")
    row, tensors = target.row, gpu_rows.prepared(target.row, inputs.tensors)
    memory, masking = tensors["memory"], inputs.masking
    name = "concat" if row.score == "concat" else "dot"
    given: tuple[Any, ...] = (tensors.get("query"), memory, 1.0, masking)
    if name == "concat":
        concat = (tensors["query_proj"], tensors["memory_proj"], tensors.get("memory_exp"))
        given = (*concat, tensors["v"], memory, masking)
    forward: Any = partial(getattr(backend, f"{name}_forward"), *given, False)
    if target.name == "forward":
        return partial(forward, False)
    saved = forward(True)
    seeds = (inputs.grad_context, None)
    return partial(getattr(backend, f"{name}_backward"), *seeds, *given, saved, target.wanted)


_kept: dict[str, Any] = {}  # of the target that was last


def _of(target: Target, device: Any, is_timed: bool) -> dict[str, Any]:
    """Its inputs, as many copies as the caches do not hold, and what the table's plan computes."""
    if _kept.get("target") != target:
        _kept.clear()
        inputs = gpu_rows.inputs_of(target.row, device.name)
        size = sum(tensor.nbytes for tensor in inputs.tensors.values())
        copies = -(-gpu_measure.COPIES_BYTES // size) if target.row.cold and is_timed else 1
        calls = [call_of(target, inputs)]
        for _ in range(min(copies, 16) - 1):
            tensors = {name: tensor.clone() for name, tensor in inputs.tensors.items()}
            calls.append(call_of(target, replace(inputs, tensors=tensors)))
        right = [x for x in calls[0]() if x is not None]
        _kept.update(target=target, calls=calls, right=right)
    return _kept


def _differs(got: Tensor, right: Tensor) -> float:
    """The largest difference, as a share of the largest value; NaN counts as all of it."""
    largest = float(right.abs().max()) or 1.0
    found = float((got.float() - right.float()).abs().max()) / largest
    return found if found == found else 1.0


def run(phase: str, item: str, options: argparse.Namespace) -> dict[str, Any]:
    target, plan = _items(options.device)[item]
    device = gpu_kernels.device_of(options)
    shown = plan or plan_of(target)
    fields: dict[str, Any] = {
        "target": str(target), "plan": vars(shown) | {"tiles": dict(shown.tiles)},
        "is_table": plan is None,
    }  # fmt: skip
    if phase == "times":
        line = gpu_lines.items(gpu_lines.read(options.lines)).get(("compile", item))
        if line is None:
            return fields | {"outcome": "deferred"}
        if line["outcome"] != "passed":
            return fields | {"outcome": "skipped", "why": "it does not run, or runs wrong"}
    try:
        kept = _of(target, device, phase == "times")
        with overriding(target.plan, plan):
            if phase == "times":
                calls = kept["calls"] * max(1, 4 // len(kept["calls"]))
                return fields | {"kernel": device.replayed(calls, BUDGET_S)}
            got = [x for x in kept["calls"][0]() if x is not None]
        worst = max(_differs(a, b) for a, b in zip(got, kept["right"], strict=True))
        fields["difference"] = round(worst, 5)
        if worst > TOLERANCE:
            return fields | {"outcome": "failed", "error": f"differs by {worst:.3g}"}
        return fields
    except torch.cuda.OutOfMemoryError:
        _kept.clear()
        return fields | {"outcome": "failed", "error": "out of memory"}
