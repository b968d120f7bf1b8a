"""`make gpu-check`: build, test and measure on a machine with an NVIDIA GPU, in under 8 minutes.

Runs with any interpreter that has torch with CUDA, Triton and the build tools; makes no environment
and downloads nothing. A step that fails does not stop the next one, and the exit code tells.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build/gpu-check/site"
BUDGET_S = 470.0
OLDEST = {"torch": (2, 11), "triton": (3, 6)}
MODULES = ("torch", "triton", "cmake", "ninja", "pybind11", "pytest", "hypothesis")
TESTS_S = 220.0  # most that the tests may take

# One call of each kernel of the cuda backend, small, for the sanitizer.
SANITIZED = """
import torch
from fused_attn import LuongAttention
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for score in ("dot", "concat"):
        for queries, width in ((1, 512), (3, 96), (8, 37)):
            module = LuongAttention(width, score=score, backend="cuda", device="cuda", dtype=dtype)
            with torch.no_grad():
                memory = torch.randn(3, 200, width, device="cuda", dtype=dtype)
                lengths = torch.tensor([200, 0, 77], device="cuda")
                query = torch.randn(3, queries, width, device="cuda", dtype=dtype)
                module(query, module.prepare_memory(memory, lengths))
torch.cuda.synchronize()
"""


def missing() -> str | None:
    """What this machine lacks, in one line; None if nothing."""
    absent = [name for name in MODULES if importlib.util.find_spec(name) is None]
    if absent:
        return f"{sys.executable} has no {', '.join(absent)}"
    for name, oldest in OLDEST.items():
        version = metadata.version(name)
        if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < oldest:
            return f"{name} {version} is older than {'.'.join(map(str, oldest))}"
    import torch

    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU"
    if not shutil.which("nvcc"):
        return "there is no nvcc on the path"
    return None


def make_site() -> None:
    """A package as it is installed: the checkout's files, and kernels/ inside of it."""
    package = SITE / "fused_attn"
    shutil.rmtree(SITE, ignore_errors=True)
    package.mkdir(parents=True)
    for path in (ROOT / "fused_attn").iterdir():
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    (package / "kernels").symlink_to(ROOT / "kernels")
    (SITE / "benchmarks").symlink_to(ROOT / "benchmarks")


def step(name: str, command: list[str | Path], limit_s: float, **environment: str) -> bool:
    """Run a command, kill it and all its children at the limit, and say how it went."""
    began = time.monotonic()
    print(f"== {name}", flush=True)
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    process = subprocess.Popen(command, cwd=ROOT, env=kept, start_new_session=True)
    try:
        code: int | str = process.wait(timeout=max(limit_s, 1.0))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        code = f"stopped after {limit_s:.0f} s"
    seconds = time.monotonic() - began
    print(f"== {name}: {'ok' if code == 0 else f'FAILED ({code})'}, {seconds:.0f} s", flush=True)
    return code == 0


def pytest_command() -> list[str]:
    """The contract tests of the two GPU backends, with the plugins that are there."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--maxfail=10", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("pytest_timeout") is None:  # then its setting is not known either
        command += ["-o", "addopts=", "-W", "ignore::pytest.PytestConfigWarning"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    names = ("test_backends*.py", "test_scores.py")
    tests = sorted(str(path) for name in names for path in (ROOT / "tests").glob(name))
    return [*command, "-k", "triton_cuda or cuda_cuda", *tests]


def main(arguments: list[str]) -> int:
    """Check, build, test, sanitize, measure."""
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/GPU")
    options = parser.parse_args(arguments)
    if why := missing():
        print(f"gpu-check: {why}", file=sys.stderr)
        return 1
    end = time.monotonic() + BUDGET_S
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    passed = [step("build", build, 200.0, FUSED_ATTN_REQUIRE_NATIVE="1")]
    make_site()
    paths = {"PYTHONPATH": str(SITE), "PYTHONSAFEPATH": "1"}
    tests_s = min(TESTS_S, 0.6 * (end - time.monotonic()))
    passed.append(step("contract tests on the GPU", pytest_command(), tests_s, **paths))
    sanitizer = shutil.which("compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        if sanitizer:
            command = [sanitizer, "--tool", tool, "--error-exitcode", "1"]
            command += [sys.executable, "-c", SANITIZED]
            passed.append(step(tool, command, 60.0, **paths))
    if not sanitizer:
        print("== no compute-sanitizer on the path: the CUDA kernels are not sanitized")
    left = max(20.0, end - time.monotonic())
    command = [sys.executable, "-m", "benchmarks", "gpu", "--budget", f"{left - 15:.0f}"]
    command += ["--output", str(options.output.resolve())] if options.output else []
    passed.append(step("benchmark", command, left + 30, **paths))
    print(f"gpu-check: {'passed' if all(passed) else 'FAILED'}")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
