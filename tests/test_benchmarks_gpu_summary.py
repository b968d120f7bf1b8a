"""The results of the GPU check, without a GPU: summary, tables, and the files that are kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import benchmarks_package
import pytest
from gpu_run import RATES, written

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def gpu() -> Iterator[SimpleNamespace]:
    with benchmarks_package.imported() as found:
        yield found.targets.gpu


def test_a_run_is_summed_up_in_4_kb(gpu: SimpleNamespace, tmp_path: Path) -> None:
    rows = written(gpu, tmp_path)
    text, passed = gpu.summary.summary(tmp_path)
    assert not passed and text.endswith("gpu-check: FAILED")
    assert len(text.encode()) <= 4000
    assert "contract: 40 failed of 100 items in 60 s" in text
    assert "(and 39 more)" in text and "crashed: the end" in text
    assert "best against eager: 3.00x" in text
    results = gpu.summary.measured(gpu.jsonl.read(tmp_path / "kernels.jsonl"), rows)
    assert len(results) == sum(len(row.backends) for row in rows)
    assert results[0] | {"error_share": 0.25} == {
        "case": str(rows[0]), "backend": "triton", "peers": {}, "error_share": 0.25,
        "worst": "context", "failed": "check: context exceeds its error budget",
    }  # fmt: skip
    # By hand: 64 x 1024 x 512 x 2 bytes are read once, at 4.3 TB/s, in 15.6 us; it took 100.
    assert results[1]["backend"] == "cuda"
    assert results[1]["share"] == pytest.approx(0.156, rel=0.01)
    assert results[1]["peers"] == pytest.approx(
        {"eager": 3.0, "sdpa": 3.0, "compile": 3.0, "flex": 3.0}
    )
    assert results[1]["verdict"] == "limit short of 0.85"
    shown = gpu.summary.everything(tmp_path)
    assert "check: context exceeds" in shown and len(shown.splitlines()) == len(results) + 2


def test_results_are_kept_whole(gpu: SimpleNamespace, tmp_path: Path) -> None:
    written(gpu, tmp_path)
    first, *rest = gpu.summary.write(tmp_path, tmp_path / "kept")
    kept = json.loads(first.read_text(encoding="utf-8"))
    assert first.parent == tmp_path / "kept/nvidia-h200"
    assert first.name == f"{kept['date'][:10]}-gpu.json"
    assert sorted(first.parent.iterdir()) == sorted([first, *rest])
    assert kept["counts"]["contract"] == {"failed": 40}
    assert len(kept["failures"]) == 42 and kept["rates"]["torch.bfloat16"] == RATES


def test_a_run_that_was_cut_off_has_not_passed(gpu: SimpleNamespace, tmp_path: Path) -> None:
    add = gpu.jsonl.append
    passed = {"phase": "cases", "item": "one", "outcome": "passed"}
    add(tmp_path / "smoke.jsonl", passed)
    add(tmp_path / "run.jsonl", {"stage": "smoke", "items": 2, "done": 1, "seconds": 1.0})
    assert gpu.summary.summary(tmp_path)[1] is False
    add(tmp_path / "run.jsonl", {"stage": "smoke", "items": 2, "done": 2, "seconds": 1.0})
    assert gpu.summary.summary(tmp_path)[1] is True


def test_models_are_compared_and_candidates_ranked(gpu: SimpleNamespace, tmp_path: Path) -> None:
    add, passed = gpu.jsonl.append, {"outcome": "passed"}
    for side, seconds in (("auto", 0.02), ("eager", 0.05)):
        item = {"phase": "work", "item": f"translate | {side}"}
        add(tmp_path / "models.jsonl", item | passed | {"work": seconds, "tokens_per_s": 9})
    for plan, seconds in (("table", 4e-5), ("online t64", 2e-5), ("online t32", 8e-5)):
        line = {"phase": "times", "item": f"forward dot | {plan}", "target": "forward dot"}
        line |= {"kernel": seconds, "is_table": plan == "table"} | passed
        add(tmp_path / "sweep.jsonl", line)
    wrong = {"phase": "compile", "item": "forward dot | online t16", "outcome": "hung", "log": ""}
    add(tmp_path / "sweep.jsonl", wrong)
    text, _ = gpu.summary.summary(tmp_path)
    assert "translate: 2.50x eager" in text
    assert "forward dot: online t64 is 2.00x the table" in text
    found = gpu.tables.sweep_results(gpu.jsonl.read(tmp_path / "sweep.jsonl"))
    ranked = [plan["plan"] for plan in found[0]["candidates"]]
    assert ranked == ["online t64", "table", "online t32"]
    shown = gpu.summary.everything(tmp_path)
    assert "0.50x" in shown and "20 us" in shown


def test_the_slowest_calls_are_profiled(gpu: SimpleNamespace, tmp_path: Path) -> None:
    arguments = ["profile", "--lines", str(tmp_path / "profile.jsonl")]
    options = gpu.worker.parser().parse_args(arguments)
    assert len(gpu.profile.items("calls", options)) == 7  # none was measured
    rows = written(gpu, tmp_path)
    known = {f"{row} | {name}" for row in rows for name in row.backends}
    found = gpu.profile.items("calls", options)
    assert len(found) == gpu.profile.MOST and set(found) <= known
