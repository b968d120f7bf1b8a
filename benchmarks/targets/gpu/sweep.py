"""The stage "sweep": candidates for the launch table, each compiled and checked, then timed.

A candidate is a plan in place of the table's. One that fails to compile, needs too much shared
memory or computes something else is a line like any other, and is not timed.
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

from benchmarks.common.calls import copies_of, prepared
from benchmarks.common.chips import H100
from benchmarks.common.problems import Sizes
from benchmarks.targets.gpu import jsonl
from benchmarks.targets.gpu.measure import COPIES_BYTES, device_named
from benchmarks.targets.gpu.pool import Phase
from benchmarks.targets.gpu.rows import GpuRow, inputs_of
from fused_attn import backends
from fused_attn.testing import Inputs

PHASES = (
    Phase("compile", jobs=14, limit_s=60.0, share=0.7),
    Phase("times", jobs=1, limit_s=20.0),
)
TABLE = "table"
BUDGET_S = 0.03  # seconds for which a candidate is timed
TOLERANCE = 0.02  # of the largest value: two plans sum in different orders, in bfloat16
REGISTERS = 200  # at most, of a thread for its part of the accumulator


@dataclass(frozen=True)
class Target:
    """A plan function, and the call in which its plan is replaced."""

    plan: str  # "forward", "backward", "context_columns", "source_gradients", "concat_gradients"
    row: GpuRow

    def __str__(self) -> str:
        return f"{self.plan} {self.row}"

    @property
    def wanted(self) -> list[bool]:
        """Which gradients are asked for: only the planned kernel's, where that is possible."""
        if self.row.score == "projected":
            return [self.plan == "concat_gradients"] * 3 + [self.plan != "concat_gradients", False]
        return [True, self.plan == "source_gradients", False]

    @property
    def name(self) -> str:
        """The backend's function: "forward" or "backward"."""
        return "forward" if self.plan in ("forward", "context_columns") else "backward"


def _target(plan: str, score: str, batch: int, queries: int, source: int, width: int) -> Target:
    return Target(plan, GpuRow(score, Sizes(batch, queries, source, width)))


# The most important ones first.
TARGETS = (
    _target("forward", "dot", 64, 64, 1024, 512),
    _target("backward", "dot", 64, 64, 1024, 512),
    _target("forward", "dot", 64, 64, 1024, 1024),
    _target("context_columns", "dot", 64, 64, 1024, 1024),
    _target("backward", "dot", 64, 64, 1024, 1024),
    _target("forward", "dot", 64, 1, 1024, 512),
    _target("forward", "projected", 64, 64, 1024, 512),
    _target("backward", "projected", 64, 64, 1024, 512),
    _target("concat_gradients", "projected", 64, 64, 1024, 512),
    _target("source_gradients", "dot", 64, 64, 1024, 512),
    _target("forward", "dot", 64, 5, 1024, 512),
    _target("forward", "dot", 64, 5, 1024, 1024),
    _target("forward", "projected", 64, 1, 1024, 512),
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
    """The number of splits and their length in whole blocks, as the table cuts."""
    segment = block * max(1, launch.cdiv(launch.cdiv(source, block), wanted))
    return launch.cdiv(source, segment), segment


def _online(row: GpuRow, is_backward: bool) -> Iterator[launch.Plan]:
    """Plans that fit into shared memory and registers."""
    width = launch.power_of_2(row.width, 16)
    longest = min(launch.power_of_2(row.queries, 16), 64)
    all_t = sorted({longest, max(longest // 2, 16), 16 if width >= 1024 else longest})
    all_s = (32, 64, 128) if width <= 256 else (16, 32, 64)
    all_stages = (1, 2, 3) if width >= 1024 else (2, 3)
    for block_t, block_s, warps, stages in itertools.product(all_t, all_s, (4, 8), all_stages):
        held = block_t * (2 if is_backward else 1) + stages * block_s
        registers = block_t * max(width, block_s) / (32 * warps)
        if 2 * width * held > H100.shared_memory - 8192 or not 16 <= registers <= REGISTERS:
            continue
        if block_s > launch.power_of_2(row.source, 16):
            continue
        tiles = {"BLOCK_T": block_t, "BLOCK_S": block_s, "BLOCK_E": width}
        programs = row.batch * launch.cdiv(row.queries, block_t)
        wanted = (1, 2, 4) if programs <= H100.multiprocessors // 4 else (1, 2)
        for number in wanted if programs < H100.multiprocessors else (1,):
            splits, segment = _cut(row.source, block_s, number)
            if splits == number:
                yield launch.Plan("online", splits, segment, tiles, warps, stages)


def _rows(row: GpuRow) -> Iterator[launch.Plan]:
    is_concat = row.score == "projected"
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


def _columns(row: GpuRow) -> Iterator[launch.Plan]:
    longest_t = launch.power_of_2(row.queries, 16)
    blocks = itertools.product((32, 64, 128), (32, 64, 128), (64, 128, 256), (4, 8), (2, 3, 4))
    for block_t, block_s, block_e, warps, stages in blocks:
        held = stages * block_s * (2 * block_e + 2 * block_t)
        if block_t > longest_t or held > H100.shared_memory - 16384:
            continue
        if 16 <= block_t * block_e / (32 * warps) <= 128 and block_t * block_s / warps <= 1024:
            tiles = {"BLOCK_T": block_t, "BLOCK_S": block_s, "BLOCK_E": block_e}
            yield launch.Plan("columns", 1, block_s, tiles, warps, stages)


def _steps(row: GpuRow) -> Iterator[launch.Plan]:
    width = launch.power_of_2(row.width, 16)
    own = plan_of(Target("forward", row)).splits
    blocks = itertools.product((2, 4, 8, 16), (2, 4, 8), (1, 2, 3, 4), (0.25, 0.5, 1, 2))
    for block_s, warps, stages, more in blocks:
        if not 16 <= block_s * width / (32 * warps) <= 64 or (stages not in (1, 3) and more != 0.5):
            continue
        splits, segment = _cut(row.source, block_s, max(1, int(own * more)))
        tiles = {"BLOCK_S": block_s, "BLOCK_E": width, "STAGES": stages}
        yield launch.Plan("step", splits, segment, tiles, warps)


def _source(row: GpuRow) -> Iterator[launch.Plan]:
    blocks = itertools.product((32, 64), (32, 64, 128), (64, 128, 256), (4, 8), (2, 3))
    for block_t, block_s, block_e, warps, stages in blocks:
        tile = block_s * block_e / (32 * warps)
        held = stages * 2 * 2 * block_t * (block_s + block_e)
        if 32 <= tile <= 128 and held < H100.shared_memory:
            tiles = {"BLOCK_T": block_t, "BLOCK_S": block_s, "BLOCK_E": block_e}
            yield launch.Plan("source", 1, block_s, tiles, warps, stages)


def _gradients(row: GpuRow) -> Iterator[launch.Plan]:
    blocks = itertools.product((16, 32), (16, 32, 64), (32, 64, 128), (2, 4, 8), (1,))
    for block_t, block_s, block_a, warps, stages in blocks:
        each = [block * block_a / (32 * warps) for block in (block_t, block_s)]
        if 4 <= min(each) and max(each) <= 32:
            tiles = {"BLOCK_T": block_t, "BLOCK_S": block_s, "BLOCK_A": block_a}
            yield launch.Plan("concat", 1, block_s, tiles, warps, stages)


def plan_of(target: Target) -> launch.Plan:
    """The table's own plan, on an H100 or H200."""
    row = target.row
    kind = launch.Kind(row.dtype == torch.float32, True, False)
    if target.plan == "source_gradients":
        return launch.source_gradients(row.width, kind)
    if target.plan == "concat_gradients":
        return launch.concat_gradients(row.width, kind)
    if target.plan == "context_columns":
        return launch.context_columns(H100, tuple(row.sizes), kind)
    sizes = (*row.sizes, row.width)
    return getattr(launch, target.plan)(H100, row.formula, sizes, kind)


def candidates(target: Target) -> list[launch.Plan]:
    """Plans to try in place of the table's, without the table's."""
    row = target.row
    if target.plan == "source_gradients":
        found = list(_source(row))
    elif target.plan == "concat_gradients":
        found = list(_gradients(row))
    elif target.plan == "context_columns":
        found = list(_columns(row))
    elif plan_of(target).regime == "step":
        found = list(_steps(row))
    elif row.score == "projected":
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
    """Target and plan by item, None for the table's, which comes first. On a CPU few and small."""
    found: dict[str, tuple[Target, launch.Plan | None]] = {}
    for target in TARGETS if device == "cuda" else _small():
        found[f"{target} | {TABLE}"] = (target, None)
        plans = candidates(target)
        for plan in plans if device == "cuda" else plans[:1]:
            found[f"{target} | {label(plan)}"] = (target, plan)
    return found


def _small() -> list[Target]:
    kinds = {(x.plan, x.row.score, x.row.queries == 1): x for x in TARGETS}.values()
    found = []
    for target in kinds:
        sizes = Sizes(2, min(target.row.queries, 5), 140, 32)
        found.append(replace(target, row=replace(target.row, sizes=sizes, cold=False)))
    return found


def items(phase: str, options: argparse.Namespace) -> list[str]:
    return list(_items(options.device))


@contextmanager
def overriding(name: str, plan: launch.Plan | None) -> Iterator[None]:
    """A context in which a function of the launch table returns this plan for every call."""
    before = getattr(launch, name)
    if plan is not None:
        setattr(launch, name, lambda *_: plan)
    try:
        yield
    finally:
        setattr(launch, name, before)


Call = Callable[[], tuple[Tensor | None, ...]]


def call_of(target: Target, inputs: Inputs) -> Call:
    """The kernel as the backend calls it, without operator or autograd."""
    backend: Any = backends.load("triton")
    row, tensors = target.row, prepared(target.row, inputs.tensors)
    memory, masking = tensors["memory"], inputs.masking
    name = "concat" if row.score == "projected" else "dot"
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


_kept: dict[str, Any] = {}  # of the last target


def _of(target: Target, device: Any, is_timed: bool) -> dict[str, Any]:
    """Its calls, on copies that no cache holds together, and what the table's plan computes."""
    if _kept.get("target") != target:
        _kept.clear()
        inputs = inputs_of(target.row, device.name)
        size = sum(tensor.nbytes for tensor in inputs.tensors.values())
        count = -(-COPIES_BYTES // size) if target.row.cold and is_timed else 1
        calls = [call_of(target, each) for each in copies_of(inputs, min(count, 16))]
        right = [x for x in calls[0]() if x is not None]
        _kept.update(target=target, calls=calls, right=right)
    return _kept


def _differs(got: Tensor, right: Tensor) -> float:
    """The largest difference as a share of the largest value; 1 if there is a NaN."""
    largest = float(right.abs().max()) or 1.0
    found = float((got.float() - right.float()).abs().max()) / largest
    return found if found == found else 1.0


def run(phase: str, item: str, options: argparse.Namespace) -> dict[str, Any]:
    target, plan = _items(options.device)[item]
    device = device_named(options.device)
    shown = plan or plan_of(target)
    fields: dict[str, Any] = {
        "target": str(target), "plan": vars(shown) | {"tiles": dict(shown.tiles)},
        "is_table": plan is None,
    }  # fmt: skip
    if phase == "times":
        line = jsonl.items(jsonl.read(options.lines)).get(("compile", item))
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
