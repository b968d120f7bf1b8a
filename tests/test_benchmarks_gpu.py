"""The GPU benchmark without a GPU: its limits, its lines, and what it says where there is none."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import benchmarks_package
import pytest
import torch

from fused_attn.problem import AttentionProblem


@pytest.fixture(scope="module")
def modules() -> Iterator[SimpleNamespace]:
    with benchmarks_package.imported() as found:
        yield found


class Host:
    """Stands in for the GPU: it runs everything, and a call takes a millisecond."""

    name = "cpu"

    def once(self, run: Callable[[], object]) -> float:
        run()
        return 1e-3

    def replayed(self, runs: list[Callable[[], object]]) -> float:
        for run in runs:
            run()
        return 1e-3

    def peak(self, run: Callable[[], object]) -> int:
        run()
        return 3 << 20

    def release(self) -> None:
        pass


@pytest.fixture
def rates(modules: SimpleNamespace) -> object:
    """An H200 as measured by others: 4.3 TB/s, 790 TFLOP/s, 132 multiprocessors at 1.98 GHz."""
    return modules.gpu_model.Rates(4.3e12, 790e12, 132, 1.98e9)


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
    modules: SimpleNamespace,
    rates: object,
) -> None:
    score, batch, queries, source, width = sizes
    problem = AttentionProblem(score, batch, queries, source, width, width, torch.bfloat16)
    limit = modules.gpu_model.limit(problem, rates, backward)
    assert getattr(limit, resource) * 1e6 == pytest.approx(microseconds, rel=0.01)
    assert limit.seconds == max(limit.memory, limit.products, limit.terms)
    assert getattr(limit, limit.bound_by) == limit.seconds


def small(modules: SimpleNamespace, **changes: object) -> object:
    options = {"dtype": torch.float32, "backends": ("eager",), "cold": False} | changes
    score, queries = options.pop("score", "dot"), options.pop("queries", 5)
    return modules.gpu_rows.Row(score, 3, queries, 17, 16, **options)


@pytest.mark.parametrize("score", ["dot", "general", "concat"])
@pytest.mark.parametrize(("queries", "backward"), [(1, False), (5, False), (5, True)])
def test_a_line_has_everything(
    score: str, queries: int, backward: bool, modules: SimpleNamespace, rates: object
) -> None:
    row = small(modules, score=score, queries=queries, backward=backward)
    line = modules.gpu.measure(row, "eager", Host(), rates)
    assert "failed" not in line
    assert line["kernel"] == line["call"] == 1e-3
    assert 0.0 <= line["error_share"] <= 1.0
    model = modules.gpu_model.limit
    least = model(row.problem(), rates).seconds
    least += model(row.problem(), rates, True).seconds if backward else 0.0
    assert line["share"] == pytest.approx(least / 1e-3)
    assert line["peers"]["eager"] == 1.0
    assert ("sdpa" in line["peers"]) == (score == "dot")
    assert len(modules.gpu.cells(line)) == len(modules.gpu.HEADER)
    assert "3 MiB" in modules.gpu.cells(line)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("wrong", [1.01, math.nan])
def test_a_wrong_result_has_no_speed(
    wrong: float,
    backward: bool,
    modules: SimpleNamespace,
    rates: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = modules.gpu_rows.ours
    monkeypatch.setattr(
        modules.gpu_rows, "ours", lambda row, b: lambda tensors: wrong * right(row, b)(tensors)
    )
    line = modules.gpu.measure(small(modules, backward=backward), "eager", Host(), rates)
    assert "of its error budget" in line["failed"]
    assert not {"kernel", "call", "share"} & line.keys()
    assert "ms" not in " ".join(modules.gpu.cells(line)).split()


def test_a_wrong_gradient_has_no_speed(
    modules: SimpleNamespace, rates: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = modules.gpu_rows.ours

    def attend(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        query = tensors["query"] + 0.01 * (tensors["query"] - tensors["query"].detach())
        return right(row, "eager")(tensors | {"query": query})

    row = small(modules, backward=True)
    monkeypatch.setattr(modules.gpu_rows, "ours", lambda row, backend: attend)
    line = modules.gpu.measure(row, "eager", Host(), rates)
    assert line["failed"].startswith("grad_query has ")


def test_what_fails_is_a_word_and_the_rest_goes_on(
    modules: SimpleNamespace, rates: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(tensors: object) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    def refuses(tensors: object) -> torch.Tensor:
        raise ValueError("head dim\nis too large")

    peers = {"eager": too_large, "flex": refuses, "sdpa": modules.gpu_rows.eager(small(modules))}
    monkeypatch.setattr(modules.gpu_rows, "peers", lambda row: peers)
    line = modules.gpu.measure(small(modules), "eager", Host(), rates)
    assert line["peers"] == {"eager": "out of memory", "flex": "ValueError: head dim", "sdpa": 1.0}
    line = modules.gpu.measure(small(modules), "eagre", Host(), rates)
    assert line["failed"].startswith("ValueError: backend must be one of")


def test_rows_without_time_or_backend_say_so(modules: SimpleNamespace, rates: object) -> None:
    row = small(modules, backends=("eager", "cuda"))
    lines = modules.gpu.run([row], Host(), {torch.float32: rates}, -math.inf, False)
    assert lines[0]["failed"] == "no time left"
    assert "CUDA" in lines[1]["failed"] or lines[1]["failed"] == "no time left"


def test_targets_are_judged_where_they_are_meant(modules: SimpleNamespace) -> None:
    row = modules.gpu_rows.Row("dot", 64, 64, 1024, 512)
    line = {"share": 0.71, "peers": {}}
    assert modules.gpu.verdict(row, line) == "limit ok"
    assert modules.gpu.verdict(row, line | {"share": 0.69}) == "limit short of 0.7"
    both = modules.gpu_rows.Row("dot", 64, 64, 1024, 512, backward=True)
    assert modules.gpu.verdict(both, {"share": 0.1, "peers": {"sdpa": 2.9}}) == "sdpa short of 3"
    assert modules.gpu.verdict(both, {"share": 0.1, "peers": {"sdpa": "out of memory"}}) == ""


def test_the_table_is_short_and_the_files_are_whole(
    modules: SimpleNamespace, tmp_path: Path
) -> None:
    measured = {
        "backend": "triton", "kernel": 1e-5, "call": 4e-5, "share": 0.5, "bound_by": "products",
        "peers": {"eager": 12.5, "compile": 3.1, "sdpa": 9.9, "flex": "NoValidChoicesError: none"},
        "peak_bytes": 1 << 30, "error_share": 0.25, "verdict": "limit short of 0.85",
    }  # fmt: skip
    lines = [
        {"case": str(row)} | measured | {"backend": backend}
        for row in modules.gpu_rows.rows()
        for backend in row.backends
    ]
    text = modules.table.render(modules.gpu.HEADER, [modules.gpu.cells(x) for x in lines], 2)
    assert len(text.splitlines()) <= 70 and len(text) < 12_000
    results = {"date": "2026-11-23T00:00:00", "gpu": "NVIDIA H200", "rows": lines}
    written = modules.gpu.write(tmp_path / "new", results)
    assert json.loads(written[0].read_text(encoding="utf-8")) == results
    assert sorted((tmp_path / "new").iterdir()) == sorted(written)
    assert modules.gpu.slug("NVIDIA H200") == "nvidia-h200"


needs_none = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@needs_none
def test_gpu_check_says_in_one_line_what_is_missing() -> None:
    command = ["make", "--silent", "gpu-check", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=benchmarks_package.ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stdout == ""
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(said) == 1 and said[0].startswith("gpu-check: ")
    assert "CUDA" in said[0] or "has no" in said[0]


def test_gpu_check_names_a_missing_package(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = modules.gpu_check
    monkeypatch.setattr(check, "MODULES", ("torch", "no_such_package"))
    assert check.missing() == f"{sys.executable} has no no_such_package"
    monkeypatch.setattr(check, "MODULES", ())
    monkeypatch.setattr(check, "OLDEST", {"torch": (99, 1)})
    assert check.missing() == f"torch {torch.__version__} is older than 99.1"


def test_a_step_that_hangs_is_stopped_with_its_children(
    modules: SimpleNamespace, capfd: pytest.CaptureFixture[str]
) -> None:
    step = modules.gpu_check.step
    assert step("fine", [sys.executable, "-c", "pass"], 60.0)
    assert not step("fails", [sys.executable, "-c", "raise SystemExit(3)"], 60.0)
    assert not step("hangs", ["sh", "-c", "sleep 1000 & wait"], 1.0)
    shown = capfd.readouterr().out
    assert "== fine: ok" in shown and "== fails: FAILED (3)" in shown
    assert "== hangs: FAILED (stopped after 1 s)" in shown


def test_the_checkout_is_made_a_package_with_its_kernels(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(modules.gpu_check, "SITE", tmp_path / "site")
    modules.gpu_check.make_site()
    code = "import fused_attn, fused_attn.kernels, benchmarks; print(fused_attn.__file__)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "site/fused_attn/__init__.py")
