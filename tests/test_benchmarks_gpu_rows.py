"""The rows of the GPU check, without a GPU: limits and sides, how they are judged and timed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import benchmarks_package
import pytest
import torch
from gpu_run import RATES

from fused_attn import testing
from fused_attn.problem import AttentionProblem

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def gpu() -> Iterator[SimpleNamespace]:
    with benchmarks_package.imported() as found:
        yield found.targets.gpu


@pytest.fixture
def rates(gpu: SimpleNamespace) -> object:
    """An H200 as measured by others: 4.3 TB/s, 790 TFLOP/s, 132 multiprocessors at 1.98 GHz."""
    return gpu.limits.Rates(4.3e12, 790e12, 132, 1.98e9)


# (score, B, T, S, D), backward, resource, microseconds. Computed by hand: bytes over 4.3 TB/s, 4 or
# 10 B T S D over 790 TFLOP/s, B T S D over 32 or 18 terms x 132 x 1.98 GHz.
LIMITS = [
    (("dot", 64, 1, 1024, 512), False, "memory", 15.6),
    (("dot", 128, 1, 8192, 512), False, "memory", 250),
    (("dot", 64, 64, 1024, 512), False, "memory", 17.6),
    (("dot", 64, 64, 1024, 512), False, "products", 10.9),
    (("dot", 64, 64, 1024, 512), True, "memory", 35.1),
    (("dot", 64, 64, 1024, 512), True, "products", 27.2),
    (("dot", 64, 64, 1024, 1024), False, "memory", 35.1),
    (("concat", 64, 64, 512, 512), False, "terms", 128),
    (("concat", 64, 64, 512, 512), True, "terms", 228),
    (("concat", 64, 1, 1024, 512), False, "memory", 31.2),
]


@pytest.mark.parametrize(("sizes", "backward", "resource", "microseconds"), LIMITS, ids=str)
def test_limits(
    sizes: tuple[object, ...],
    backward: bool,
    resource: str,
    microseconds: float,
    gpu: SimpleNamespace,
    rates: object,
) -> None:
    score, batch, queries, source, width = sizes
    problem = AttentionProblem(score, batch, queries, source, width, width, torch.bfloat16)
    limit = gpu.limits.limit(problem, rates, backward)
    assert getattr(limit, resource) * 1e6 == pytest.approx(microseconds, rel=0.01)
    assert limit.seconds == max(limit.memory, limit.products, limit.terms)
    assert getattr(limit, limit.bound_by) == limit.seconds


def test_smoke_cases_reach_every_tile_variant(gpu: SimpleNamespace) -> None:
    cases, launch = gpu.cases, gpu.cases.launch
    found = cases.triton()
    assert len({str(case) for case in found}) == len(found) < 300
    assert len({str(case) for case in cases.cuda()}) == len(cases.cuda()) < 300
    kind = launch.Kind(False, True, False)
    online = set()
    for queries in (16, 32, 64, 128):
        for width in (64, 128, 256, 512, 1024, 2048):
            for is_backward in (False, True):
                sizes = (3, queries, 300, width)
                if plan := launch.online(cases.H100, *sizes, kind, is_backward):
                    tiles = (plan.tiles["BLOCK_T"], plan.tiles["BLOCK_E"], plan.num_warps)
                    online.add((is_backward, *tiles))
    reached = set()
    for case in found:
        for variant in cases.variants(case):
            if variant[2] == "online" and case.mask != "cube" and case.dtype == torch.bfloat16:
                sizes = dict(variant[3])
                tiles = (sizes["BLOCK_T"], sizes["BLOCK_E"], variant[4])
                reached.add((variant[0] == "backward", *tiles))
    # Narrower than 128 columns the tiles are those of 128.
    assert {x for x in online if x[2] >= 128} <= reached
    assert {case.queries for case in cases.cuda()} == {1, 2, 3, 4, 5, 8}
    assert {case.memory_dim for case in cases.cuda()} >= {37, 512, 1024, 2048}


@pytest.fixture(scope="module")
def options(gpu: SimpleNamespace) -> Any:
    return gpu.worker.parser().parse_args(["smoke", "cases", "--device", "cpu"])


def small(gpu: SimpleNamespace, **changes: Any) -> Any:
    given = {"dtype": torch.float32, "backends": ("eager",), "cold": False} | changes
    score, queries = given.pop("score", "dot"), given.pop("queries", 5)
    return gpu.rows.GpuRow(score, gpu.rows.Sizes(3, queries, 17, 16), **given)


KINDS = [
    {}, {"queries": 1}, {"backward": True}, {"lengths": True, "backward": True},
    {"weights": True}, {"window": 3}, {"window": 3, "backward": True},
]  # fmt: skip


@pytest.mark.parametrize("score", ["dot", "general", "projected"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_side_of_a_row_computes_the_same(
    score: str, kind: dict[str, Any], gpu: SimpleNamespace
) -> None:
    row = small(gpu, score=score, **kind)
    inputs = gpu.rows.inputs_of(row, "cpu")
    assert gpu.measure.check(row, "eager", inputs).passed
    oracle = testing.oracle(inputs)
    assert ("sdpa" in row.sides()) == (score == "dot" and not row.weights)
    for side in row.sides():
        attend = gpu.rows.side(row, side, inputs)
        context, weights = attend(gpu.measure.calls.prepared(row, inputs.tensors))
        torch.testing.assert_close(context.double(), oracle["context"], rtol=1e-4, atol=1e-5)
        assert (weights is not None) == row.weights
        times = gpu.measure.time_of(gpu.measure.Host(), row, attend, inputs)
        assert times == {"call": 1e-3, "kernel": 1e-3, "graph": True}


@pytest.mark.parametrize("wrong", [1.01, math.nan])
def test_a_wrong_result_is_found(
    wrong: float, gpu: SimpleNamespace, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = small(gpu)
    right = gpu.measure.fused

    def fused(*given: Any) -> Any:
        attend = right(*given)
        return lambda tensors: (wrong * attend(tensors)[0], None)

    monkeypatch.setattr(gpu.measure, "fused", fused)
    monkeypatch.setattr(gpu.kernels, "rows", lambda device: {str(row): row})
    line = gpu.kernels.run("checks", f"{row} | eager", options)
    assert line["outcome"] == "failed" and line["error"] == "context exceeds its error budget"


def test_what_no_graph_can_hold_is_timed_without(gpu: SimpleNamespace) -> None:
    class Device(gpu.measure.Host):
        def replayed(self, runs: Any) -> float:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    row = small(gpu)
    inputs = gpu.rows.inputs_of(row, "cpu")
    attend = gpu.rows.side(row, "eager", inputs)
    times = gpu.measure.time_of(Device(), row, attend, inputs)
    assert times["kernel"] == 1e-3 / 8
    assert times["graph"] == "RuntimeError: operation not permitted when stream is capturing"


def test_rows_keep_the_names_that_results_have(gpu: SimpleNamespace) -> None:
    path = benchmarks_package.LOCATION / "results/nvidia-h200/2026-11-27-gpu.json"
    kept = {row["case"] for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    assert len(kept) > 50 and kept <= {str(row) for row in gpu.rows.all_rows()}


def test_lengths_and_windows_lower_the_limit(gpu: SimpleNamespace) -> None:
    row = gpu.rows.GpuRow("dot", gpu.rows.Sizes(64, 1, 1023, 512))
    rates = gpu.limits.Rates(**RATES)
    whole = gpu.summary.limit_of(row, rates)[0]
    half = replace(row, lengths=True)
    assert gpu.summary.limit_of(half, rates)[0] == pytest.approx(whole * 512 / 1023)
    window = replace(row, window=5)
    assert gpu.summary.limit_of(window, rates)[0] == pytest.approx(whole * 11 / 1023)
