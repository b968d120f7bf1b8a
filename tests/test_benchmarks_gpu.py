"""The GPU check without a GPU: its workers and what kills them, its lines, items and summary."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import benchmarks_package
import pytest
import torch

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


# Stands in for a stage: what an item does is its name.
STAGE = """
import os, signal, sys, time
from benchmarks.targets.gpu import lines as gpu_lines
from benchmarks.targets.gpu.pool import Phase

PHASES = (Phase("first", jobs=2, limit_s=1.5, start_s=30.0), Phase("second", 1, 1.5, 30.0))
ITEMS = {items!r}

def items(phase, options):
    return ITEMS if phase == "first" else ["last"]

def run(phase, item, options):
    what = item.partition(" ")[0]
    if what == "raise":
        raise ValueError("told to\\nraise")
    if what == "wrong":
        return {{"outcome": "failed", "error": "wrong"}}
    if what == "abort":
        print("about to abort", flush=True)
        os.abort()
    if what == "exit":
        os._exit(7)
    if what == "hang":
        time.sleep(1000)
    if what == "slow":
        time.sleep(0.3)
    if what == "half":
        with open(options.lines, "ab", buffering=0) as file:
            file.write(b'{{"phase": "first", "item": "ok 1", "outco')
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "lost":
        sys.modules["__main__"].lost_context = lambda device: "AcceleratorError: illegal address"
        raise RuntimeError("launch failure")
    return {{"pid": os.getpid()}}
"""


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes `fakes.stage` with some items, and the environment that finds it."""
    (tmp_path / "site/fakes").mkdir(parents=True)
    (tmp_path / "site/benchmarks").symlink_to(benchmarks_package.LOCATION)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setenv("PYTHONSAFEPATH", "1")

    def make(*items: str) -> Path:
        text = STAGE.format(items=list(items))
        (tmp_path / "site/fakes/stage.py").write_text(text, encoding="utf-8")
        return tmp_path / "fakes.stage.jsonl"

    return make


def run_pool(gpu: SimpleNamespace, target: Path, items: list[str], **options: Any) -> dict:
    """The lines of the fake stage's first phase, by item."""
    blocks = options.pop("in_blocks", False)
    phase = gpu.pool.Phase("first", options.pop("jobs", 2), 1.5, 30.0, blocks)
    end = time.monotonic() + options.pop("seconds", 60.0)
    name = options.pop("name", "fakes.stage")
    pool = gpu.pool.Pool(gpu.pool.Job(name, phase, items, target, end, **options))
    pool.run()
    lines = gpu.lines.items(gpu.lines.read(target))
    return {item: line for (_, item), line in lines.items()}


def test_each_accident_costs_one_line(gpu: SimpleNamespace, stage: Any) -> None:
    bad = ["raise", "wrong", "abort", "exit", "hang", "half", "lost"]
    items = [x for number, name in enumerate(bad) for x in (name, f"ok {number}")]
    found = run_pool(gpu, stage(*items), items)
    assert sorted(found) == sorted(items)
    outcomes = {name: found[name]["outcome"] for name in bad}
    assert outcomes == {
        "raise": "failed", "wrong": "failed", "abort": "crashed", "exit": "crashed",
        "hang": "hung", "half": "crashed", "lost": "cuda_error",
    }  # fmt: skip
    assert {found[f"ok {n}"]["outcome"] for n in range(len(bad))} == {"passed"}
    assert found["raise"]["error"] == "ValueError: told to\nraise"
    assert (found["abort"]["code"], found["exit"]["code"]) == (-signal.SIGABRT, 7)
    assert "about to abort" in found["abort"]["log"]
    assert found["half"]["code"] == -signal.SIGKILL
    assert 1.5 <= found["hang"]["seconds"] < 10.0
    assert found["lost"]["cuda"] == "AcceleratorError: illegal address"
    assert found["lost"]["error"] == "RuntimeError: launch failure"


def test_a_worker_goes_on_until_it_is_lost(gpu: SimpleNamespace, stage: Any) -> None:
    items = ["ok 1", "ok 2", "raise", "ok 3", "lost", "ok 4"]
    found = run_pool(gpu, stage(*items), items, jobs=1)
    pids = [found[f"ok {number}"]["pid"] for number in (1, 2, 3, 4)]
    assert pids[0] == pids[1] == pids[2] != pids[3]


def test_two_workers_share_what_is_left(gpu: SimpleNamespace, stage: Any) -> None:
    items = ["hang", "ok 1", "ok 2", "ok 3", "ok 4", "ok 5"]
    found = run_pool(gpu, stage(*items), items, in_blocks=True)
    # The block of the one that hangs is taken over, but for what it hangs at.
    assert found["ok 1"]["pid"] == found["ok 5"]["pid"]


def test_the_end_of_the_stage_leaves_no_line_of_what_it_stops(
    gpu: SimpleNamespace, stage: Any
) -> None:
    items = [f"slow {number}" for number in range(100)]
    began = time.monotonic()
    found = run_pool(gpu, stage(*items), items, seconds=4.0)
    assert time.monotonic() - began < 15.0
    assert 0 < len(found) < 100
    assert {line["outcome"] for line in found.values()} == {"passed"}


def test_workers_that_do_not_start_end_the_stage(gpu: SimpleNamespace, stage: Any) -> None:
    target = stage("ok 1")
    items = [f"ok {number}" for number in range(50)]
    found = run_pool(gpu, target, items, name="fakes.nothing")
    assert list(found) == ["(start)"]
    assert found["(start)"]["outcome"] == "crashed"
    assert "No module named 'fakes.nothing'" in found["(start)"]["log"]


DRIVER = """
import sys, time
from pathlib import Path
from benchmarks.targets.gpu import check as gpu_check
options = gpu_check.parser().parse_args(["--device", "cpu", "--output", sys.argv[1], *sys.argv[2:]])
options.end = time.monotonic() + 100
print(gpu_check.run_stage("fakes.stage", 60.0, options))
"""


def workers_of(target: Path) -> list[str]:
    """Processes that write to a file, by its name among their arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(target).encode() in path.read_bytes().split(b"\0"):
                found.append(path.parent.name)
        except OSError:  # it has ended
            continue
    return found


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_killed_is_resumed(
    how: signal.Signals, gpu: SimpleNamespace, stage: Any, tmp_path: Path
) -> None:
    names = ["hang", *(f"slow {number}" for number in range(12))]
    target = stage(*names)
    command = [sys.executable, "-c", DRIVER, str(tmp_path)]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while len(gpu.lines.read(target)) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    assert len(workers_of(target)) == 2
    driver.send_signal(how)
    driver.communicate(timeout=20)
    before = gpu.lines.read(target)
    assert 2 <= len(before) < 12 and all("slow" in line["item"] for line in before)
    while workers_of(target) and time.monotonic() < end:
        time.sleep(0.05)
    assert not workers_of(target)
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=True)
    assert "'items': 14, 'done': 14" in done.stdout
    lines = gpu.lines.read(target)
    assert lines[: len(before)] == before
    assert sorted(line["item"] for line in lines) == sorted([*names, "last"])
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=True)
    assert "'done': 14" in again.stdout and gpu.lines.read(target) == lines
    one = [*command, "--only", "slow 1$"]
    assert "'items': 1," in subprocess.run(one, capture_output=True, text=True, check=True).stdout
    assert [line["item"] for line in gpu.lines.read(target)] == ["slow 1"]


def test_a_lost_context_is_told_from_an_error(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def synchronize() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    worker = gpu.worker
    assert worker.lost_context("cpu") is None
    cuda = SimpleNamespace(is_initialized=lambda: False, synchronize=synchronize)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert worker.lost_context("cuda") is None
    cuda.is_initialized = lambda: True
    lost = worker.lost_context("cuda")
    assert lost == "RuntimeError: CUDA error: an illegal memory access was encountered"


TESTS = """
import os, sys, time
import pytest

def test_passes():
    pass

@pytest.mark.parametrize("number", [1, 2])
def test_fails(number):
    assert number == 3, "a long story"

@pytest.mark.skip(reason="not here")
def test_skipped():
    pass

@pytest.fixture
def broken():
    raise OSError("no fixture")

def test_setup(broken):
    pass

def test_aborts():
    os.abort()

def test_loses():
    sys.modules["benchmarks.targets.gpu.contract"].lost_context = lambda device: "lost"
    raise RuntimeError("CUDA error: launch failure")

def test_after():
    pass
"""


def test_contract_tests_are_lines(gpu: SimpleNamespace, stage: Any, tmp_path: Path) -> None:
    stage()
    (tmp_path / "test_some.py").write_text(TESTS, encoding="utf-8")
    (tmp_path / "test_broken.py").write_text("import no_such_package", encoding="utf-8")
    files = [str(tmp_path / f"test_{name}.py") for name in ("some", "broken")]
    options = gpu.worker.parser().parse_args(["contract", "--tests", *files])
    command = [
        sys.executable,
        "-m",
        "benchmarks.targets.gpu.worker",
        "contract",
        "--list",
        "--tests",
    ]
    done = subprocess.run([*command, *options.tests], capture_output=True, text=True, check=True)
    names = json.loads(done.stdout.splitlines()[-1])["tests"]
    target = tmp_path / "contract.jsonl"
    phase = gpu.pool.Phase("tests", 1, 20.0, 60.0)
    end, arguments = time.monotonic() + 60, ("--tests", *options.tests)
    job = gpu.pool.Job("contract", phase, names, target, end, arguments)
    gpu.pool.Pool(job).run()
    lines = gpu.lines.items(gpu.lines.read(target))
    found = {item.rpartition("::")[2]: line for (_, item), line in lines.items()}
    assert "no_such_package" in found.pop("(collection)")["error"]
    outcomes = {name: line["outcome"] for name, line in found.items()}
    assert outcomes == {
        "test_passes": "passed", "test_fails[1]": "failed", "test_fails[2]": "failed",
        "test_skipped": "skipped", "test_setup": "failed", "test_aborts": "crashed",
        "test_loses": "cuda_error", "test_after": "passed",
    }  # fmt: skip
    assert found["test_fails[1]"]["error"] == "AssertionError: a long story"
    assert "assert 1 == 3" in found["test_fails[1]"]["text"]
    assert found["test_setup"]["when"] == "setup"
    assert found["test_setup"]["error"] == "OSError: no fixture"
    assert found["test_loses"]["error"] == "RuntimeError: CUDA error: launch failure"


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
                if plan := launch.online(cases.CHIP, *sizes, kind, is_backward):
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
    return gpu.rows.Row(score, 3, queries, 17, 16, **given)


KINDS = [
    {}, {"queries": 1}, {"backward": True}, {"lengths": True, "backward": True},
    {"weights": True}, {"half_width": 3}, {"half_width": 3, "backward": True},
]  # fmt: skip


@pytest.mark.parametrize("score", ["dot", "general", "concat"])
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
        context, weights = attend(gpu.rows.prepared(row, inputs.tensors))
        torch.testing.assert_close(context.double(), oracle["context"], rtol=1e-4, atol=1e-5)
        assert (weights is not None) == row.weights
        times = gpu.measure.time_of(gpu.kernels.Host(), row, attend, inputs)
        assert times == {"call": 1e-3, "kernel": 1e-3, "graph": True}


@pytest.mark.parametrize("wrong", [1.01, math.nan])
def test_a_wrong_result_is_found(
    wrong: float, gpu: SimpleNamespace, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = small(gpu)
    right = gpu.rows.ours

    def ours(*given: Any) -> Any:
        attend = right(*given)
        return lambda tensors: (wrong * attend(tensors)[0], None)

    monkeypatch.setattr(gpu.rows, "ours", ours)
    monkeypatch.setattr(gpu.kernels, "rows", lambda device: {str(row): row})
    line = gpu.kernels.run("checks", f"{row} | eager", options)
    assert line["outcome"] == "failed" and line["error"] == "context exceeds its error budget"


def test_what_no_graph_can_hold_is_timed_without(gpu: SimpleNamespace) -> None:
    class Device(gpu.kernels.Host):
        def replayed(self, runs: Any) -> float:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    row = small(gpu)
    inputs = gpu.rows.inputs_of(row, "cpu")
    attend = gpu.rows.side(row, "eager", inputs)
    times = gpu.measure.time_of(Device(), row, attend, inputs)
    assert times["kernel"] == 1e-3 / 8
    assert times["graph"] == "RuntimeError: operation not permitted when stream is capturing"


RATES = {"copy": 4.3e12, "matrix": 790e12, "multiprocessors": 132, "clock": 1.98e9}


def written(gpu: SimpleNamespace, directory: Path) -> list[Any]:
    """Lines of all rows, as a whole run on an H200 leaves them; the first backend's is wrong."""
    rows = gpu.rows.rows()
    add = gpu.lines.append
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    rates = {"gpu": "NVIDIA H200", "rates": {str(dtype): RATES for dtype in kinds}}
    passed = {"outcome": "passed", "seconds": 1.0}
    add(directory / "kernels.jsonl", {"phase": "times", "item": "rates"} | passed | rates)
    for number, row in enumerate(rows):
        for side in row.sides():
            item = {"item": f"{row} | {side}"} | passed
            if side in row.backends:
                wrong = {"outcome": "failed", "error": "context exceeds its error budget"}
                first = wrong if number == 0 and side == "triton" else {}
                check = {"phase": "checks", "error_share": 0.25, "worst": "context"}
                add(directory / "kernels.jsonl", item | check | first)
            phase = "compilers" if side in gpu.rows.COMPILERS else "times"
            slow = 1 if side in row.backends else 3
            times = {"call": 4e-4, "kernel": slow * 1e-4, "graph": True, "peak_bytes": 3 << 20}
            add(directory / "kernels.jsonl", item | {"phase": phase} | times)
    for number in range(40):
        name = f"tests/test_backends.py::test_some[{'x' * 60}-{number}]"
        line = {
            "phase": "tests",
            "item": name,
            "outcome": "failed",
            "error": "y" * 200 + str(number),
        }
        add(directory / "contract.jsonl", line)
    crashed = {"phase": "cases", "item": "cuda dot", "outcome": "crashed", "log": "a\nthe end"}
    add(directory / "smoke.jsonl", crashed)
    for name in ("build", "smoke", "contract", "kernels"):
        run = {"stage": name, "items": 100, "done": 100, "seconds": 60.0}
        add(directory / "run.jsonl", run)
    return rows


def test_a_run_is_summed_up_in_4_kb(gpu: SimpleNamespace, tmp_path: Path) -> None:
    rows = written(gpu, tmp_path)
    text, passed = gpu.summary.summary(tmp_path)
    assert not passed and text.endswith("gpu-check: FAILED")
    assert len(text.encode()) <= 4000
    assert "contract: 40 failed of 100 items in 60 s" in text
    assert "(and 39 more)" in text and "crashed: the end" in text
    assert "best against eager: 3.00x" in text
    results = gpu.summary.measured(gpu.lines.read(tmp_path / "kernels.jsonl"), rows)
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
    shown = gpu.summary.tables(tmp_path)
    assert "check: context exceeds" in shown and len(shown.splitlines()) == len(results) + 2


def test_lengths_and_windows_lower_the_limit(gpu: SimpleNamespace) -> None:
    row = gpu.rows.Row("dot", 64, 1, 1023, 512)
    rates = gpu.limits.Rates(**RATES)
    whole = gpu.summary.limit_of(row, rates)[0]
    half = replace(row, lengths=True)
    assert gpu.summary.limit_of(half, rates)[0] == pytest.approx(whole * 512 / 1023)
    window = replace(row, half_width=5)
    assert gpu.summary.limit_of(window, rates)[0] == pytest.approx(whole * 11 / 1023)


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
    add = gpu.lines.append
    passed = {"phase": "cases", "item": "one", "outcome": "passed"}
    add(tmp_path / "smoke.jsonl", passed)
    add(tmp_path / "run.jsonl", {"stage": "smoke", "items": 2, "done": 1, "seconds": 1.0})
    assert gpu.summary.summary(tmp_path)[1] is False
    add(tmp_path / "run.jsonl", {"stage": "smoke", "items": 2, "done": 2, "seconds": 1.0})
    assert gpu.summary.summary(tmp_path)[1] is True


def test_stages_have_limits(gpu: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    parsed = gpu.check.parsed_stages
    assert parsed("smoke:40, sweep") == {
        "smoke": 40.0,
        "sweep": gpu.check.LIMITS["sweep"],
    }
    assert sum(parsed(gpu.check.DEFAULT).values()) <= 420
    for wrong in ("smok", "smoke:x", "smoke:-1", "smoke:inf", ""):
        with pytest.raises(SystemExit):
            gpu.check.parser().parse_args(["--stages", wrong])
        assert "a stage is one of smoke, contract" in capsys.readouterr().err


needs_none = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@needs_none
def test_gpu_check_says_in_one_line_what_is_missing() -> None:
    command = ["make", "--silent", "gpu-check", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=benchmarks_package.ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stdout == ""
    told = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(told) == 1 and told[0].startswith("gpu-check: ")
    assert "CUDA" in told[0] or "has no" in told[0]


def test_gpu_check_names_a_missing_package(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = gpu.check
    monkeypatch.setattr(check, "MODULES", ("torch", "no_such_package"))
    assert check.missing() == f"{sys.executable} has no no_such_package"
    monkeypatch.setattr(check, "MODULES", ())
    monkeypatch.setattr(check, "OLDEST", {"torch": (99, 1)})
    assert check.missing() == f"torch {torch.__version__} is older than 99.1"


def test_the_checkout_is_made_a_package_with_its_kernels(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu.check, "SITE", tmp_path / "site")
    gpu.check.make_site()
    code = "import fused_attn, fused_attn.kernels, benchmarks; print(fused_attn.__file__)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "site/fused_attn/__init__.py")


def test_models_are_compared_and_candidates_ranked(gpu: SimpleNamespace, tmp_path: Path) -> None:
    add, passed = gpu.lines.append, {"outcome": "passed"}
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
    found = gpu.tables.sweep_results(gpu.lines.read(tmp_path / "sweep.jsonl"))
    ranked = [plan["plan"] for plan in found[0]["candidates"]]
    assert ranked == ["online t64", "table", "online t32"]
    shown = gpu.summary.tables(tmp_path)
    assert "0.50x" in shown and "20 us" in shown


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
    gpu.lines.append(lines, failed)
    assert sweep.run("times", item, options)["outcome"] == "skipped"
    gpu.lines.append(lines, failed | {"outcome": "passed"})
    assert sweep.run("times", item, options)["kernel"] == 1e-3


def test_what_the_sanitizer_says_is_a_line(
    gpu: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    clean = "========= COMPUTE-SANITIZER\ncalls made\n========= ERROR SUMMARY: 0 errors\n"
    verdict = gpu.sanitize.verdict
    assert verdict(0, clean) == {"tool": "0 errors"}
    found = "========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 4 bytes\n"
    line = verdict(9, found + "=========     at decode+0x10\n========= ERROR SUMMARY: 1 error\n")
    assert line["outcome"] == "failed"
    assert line["error"] == "Invalid __global__ read of size 4 bytes"
    assert "decode+0x10" in line["text"]
    # The tool may end well though what it watched never got to the calls.
    assert verdict(0, "Device not supported")["outcome"] == "failed"
    race = gpu.sanitize.command("racecheck cuda-dot", "cuda")
    assert race[race.index("--kernel-regex") + 1] == "kns=decode"
    assert gpu.sanitize.call("triton-step", "cpu") == 0
    assert capsys.readouterr().out == "calls made\n"


PROFILED = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread"
"","","","us","register/thread"
"0","7","online_forward","43.2","168"
"1","7","merge_forward","5.1","40"
==PROF== Disconnected from process 7
"""


def test_what_the_profiler_prints_is_read(
    gpu: SimpleNamespace, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = gpu.profile
    assert profile.parsed(PROFILED) == [
        {"kernel": "online_forward", "time": "43.2 us", "registers": "168 register/thread"},
        {"kernel": "merge_forward", "time": "5.1 us", "registers": "40 register/thread"},
    ]
    told = ["==ERROR== Failed to find metric sm__inst", PROFILED]
    asked = []

    def run(command: list[str], **_: Any) -> Any:
        asked.append(command[command.index("--metrics") + 1])
        return SimpleNamespace(stdout=told[len(asked) - 1], returncode=0)

    monkeypatch.setattr(profile.subprocess, "run", run)
    assert len(profile.run("calls", "any | triton", options)["kernels"]) == 2
    assert "tensor" in asked[0] and "tensor" not in asked[1]
    asked.clear()
    told[1] = "==ERROR== ERR_NVGPUCTRPERM"
    line = profile.run("calls", "any | triton", options)
    assert line["outcome"] == "failed" and "ERR_NVGPUCTRPERM" in line["error"]


def test_the_slowest_calls_are_profiled(gpu: SimpleNamespace, tmp_path: Path) -> None:
    arguments = ["profile", "--lines", str(tmp_path / "profile.jsonl")]
    options = gpu.worker.parser().parse_args(arguments)
    assert len(gpu.profile.items("calls", options)) == 7  # none was measured
    rows = written(gpu, tmp_path)
    known = {f"{row} | {name}" for row in rows for name in row.backends}
    found = gpu.profile.items("calls", options)
    assert len(found) == gpu.profile.MOST and set(found) <= known


@pytest.mark.parametrize("missing", [None, "nvcc was not found"])
def test_a_native_module_with_cuda_is_not_built_again(
    missing: str | None,
    gpu: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it lacks is None where it lacks nothing."""
    package = tmp_path / "fused_attn"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "_C.py").write_text(f"def cuda_build():\n    return {{'missing': {missing!r}}}\n")
    monkeypatch.setattr(gpu.check, "SITE", tmp_path)
    assert gpu.check.built() == missing
