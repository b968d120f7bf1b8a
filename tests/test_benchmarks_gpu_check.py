"""The command of the GPU check, without a GPU: its stages, what it needs, and the tools it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import benchmarks_package
import pytest
import torch

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def gpu() -> Iterator[SimpleNamespace]:
    with benchmarks_package.imported() as found:
        yield found.targets.gpu


@pytest.fixture(scope="module")
def options(gpu: SimpleNamespace) -> Any:
    return gpu.worker.parser().parse_args(["smoke", "cases", "--device", "cpu"])


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
