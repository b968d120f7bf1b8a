"""The sweep of the GPU check, without a GPU: its candidates, and what is timed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import benchmarks_package
import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def gpu() -> Iterator[SimpleNamespace]:
    with benchmarks_package.imported() as found:
        yield found.targets.gpu


@pytest.fixture(scope="module")
def options(gpu: SimpleNamespace) -> Any:
    return gpu.worker.parser().parse_args(["smoke", "cases", "--device", "cpu"])


def test_candidates_are_other_plans_that_fit(gpu: SimpleNamespace) -> None:
    sweep = gpu.sweep
    items = sweep._items("cuda")
    assert len(items) * sweep.BUDGET_S < 75  # seconds of the device, when all are timed
    for target in sweep.TARGETS:
        plans = sweep.candidates(target)
        own = sweep.plan_of(target)
        assert len(plans) >= 8 and own not in plans
        assert len({sweep.label(plan) for plan in plans}) == len(plans)
        for plan in plans:
            tiles, source = plan.tiles, target.row.source
            blocks = [size for name, size in tiles.items() if name.startswith("BLOCK")]
            assert all(size & (size - 1) == 0 for size in blocks)
            if plan.regime in ("rows", "online", "step"):
                assert (plan.splits - 1) * plan.segment < source <= plan.splits * plan.segment
                assert plan.segment % tiles["BLOCK_S"] == 0
            if plan.regime in ("step", "online"):
                assert tiles["BLOCK_E"] >= target.row.width
    # What was counted from the machine code to be better is among them.
    wide = sweep.candidates(sweep.TARGETS[0])
    found = {(*plan.tiles.values(), plan.num_warps, plan.num_stages) for plan in wide}
    assert (64, 64, 512, 8, 2) in found


@pytest.mark.parametrize("name", ["forward", "backward", "source_gradients", "concat_gradients"])
def test_a_candidate_is_what_the_backend_launches(
    name: str, gpu: SimpleNamespace, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, launch = gpu.sweep, gpu.sweep.launch
    target = next(target for target in sweep._small() if target.plan == name)
    plan = sweep.candidates(target)[0]
    seen = []

    def asked(*given: Any) -> Any:
        seen.append(given)
        return plan

    before = getattr(launch, name)
    with sweep.overriding(name, plan):
        assert getattr(launch, name)("anything") is plan
    assert getattr(launch, name) is before
    # Its outputs are those of the table, and of the call that plans it.
    monkeypatch.setattr(launch, name, asked)
    inputs = gpu.rows.inputs_of(target.row, "cpu")
    sweep.call_of(target, inputs)()
    assert seen


def test_a_wrong_candidate_is_a_line(
    gpu: SimpleNamespace, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = gpu.sweep
    target = next(target for target in sweep._small() if target.plan == "forward")
    item = f"{target} | {sweep.label(sweep.candidates(target)[0])}"
    assert sweep.run("compile", item, options)["difference"] <= sweep.TOLERANCE
    kept = sweep._kept["right"]
    kept[0] = kept[0] + 0.1 * kept[0].abs().max()
    line = sweep.run("compile", item, options)
    assert line["outcome"] == "failed" and line["error"].startswith("differs by 0.")
    kept[0] = kept[0] * math.nan
    assert sweep.run("compile", item, options)["outcome"] == "failed"


def test_only_what_compiled_is_timed(
    gpu: SimpleNamespace, options: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, lines = gpu.sweep, tmp_path / "sweep.jsonl"
    monkeypatch.setattr(options, "lines", lines)
    target = next(target for target in sweep._small() if target.plan == "forward")
    item = f"{target} | table"
    assert sweep.run("times", item, options)["outcome"] == "deferred"
    failed = {"phase": "compile", "item": item, "outcome": "failed"}
    gpu.jsonl.append(lines, failed)
    assert sweep.run("times", item, options)["outcome"] == "skipped"
    gpu.jsonl.append(lines, failed | {"outcome": "passed"})
    assert sweep.run("times", item, options)["kernel"] == 1e-3
