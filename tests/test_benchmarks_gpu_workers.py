"""The workers of the GPU check, without a GPU: what kills them, and the lines they leave."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
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


# Stands in for a stage: what an item does is its name.
STAGE = """
import os, signal, sys, time
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
    lines = gpu.jsonl.items(gpu.jsonl.read(target))
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
from benchmarks.targets.gpu import check
options = check.parser().parse_args(["--device", "cpu", "--output", sys.argv[1], *sys.argv[2:]])
options.end = time.monotonic() + 100
print(check.run_stage("fakes.stage", 60.0, options))
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
    while len(gpu.jsonl.read(target)) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    assert len(workers_of(target)) == 2
    driver.send_signal(how)
    driver.communicate(timeout=20)
    before = gpu.jsonl.read(target)
    assert 2 <= len(before) < 12 and all("slow" in line["item"] for line in before)
    while workers_of(target) and time.monotonic() < end:
        time.sleep(0.05)
    assert not workers_of(target)
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=True)
    assert "'items': 14, 'done': 14" in done.stdout
    lines = gpu.jsonl.read(target)
    assert lines[: len(before)] == before
    assert sorted(line["item"] for line in lines) == sorted([*names, "last"])
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=True)
    assert "'done': 14" in again.stdout and gpu.jsonl.read(target) == lines
    one = [*command, "--only", "slow 1$"]
    assert "'items': 1," in subprocess.run(one, capture_output=True, text=True, check=True).stdout
    assert [line["item"] for line in gpu.jsonl.read(target)] == ["slow 1"]


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
    lines = gpu.jsonl.items(gpu.jsonl.read(target))
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
