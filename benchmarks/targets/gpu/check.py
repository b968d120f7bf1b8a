"""`make gpu-check`: build, test and measure on a machine with an NVIDIA GPU, stage by stage.

Runs with any interpreter that has torch with CUDA, Triton, numpy and pytest; makes no environment
and downloads nothing. Every result is written at once, as a line of JSON in DIR/STAGE.jsonl: a
kernel that crashes or hangs costs one line, and ``--resume`` continues a run that was cut off.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.common.files import ROOT

SITE = ROOT / "build/gpu-check/site"
CUDA_TOOLS = "/usr/local/cuda/bin"
OLDEST = {"torch": (2, 11), "triton": (3, 6)}
MODULES = ("torch", "triton", "numpy", "pytest")
BUILD_MODULES = ("cmake", "ninja", "pybind11", "setuptools")
BUILD_S, LIST_S = 240.0, 90.0

# Seconds that each stage may take. Stages run in the order in which they are asked for.
LIMITS = {
    "smoke": 100.0, "contract": 180.0, "kernels": 150.0, "models": 60.0, "sanitize": 90.0,
    "sweep": 150.0, "profile": 60.0,
}  # fmt: skip
DEFAULT = "smoke:80,contract:160,kernels:140"  # within 8 minutes, with a build


def parsed_stages(text: str) -> dict[str, float]:
    """``smoke:40,sweep`` as limits by stage."""
    found = {}
    for part in text.split(","):
        name, colon, limit = part.strip().partition(":")
        try:
            seconds = float(limit) if colon else LIMITS[name]
        except (KeyError, ValueError):
            seconds = -1.0
        if name not in LIMITS or not 0 < seconds < float("inf"):
            known = ", ".join(LIMITS)
            raise argparse.ArgumentTypeError(f"a stage is one of {known}, got {part!r}")
        found[name] = seconds
    return found


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="make gpu-check", description=__doc__)
    made.add_argument("--stages", type=parsed_stages, default=DEFAULT, metavar="STAGE[:SECONDS],..")
    made.add_argument("--output", type=Path, default=ROOT / "build/gpu-check/results")
    made.add_argument("--budget", type=float, default=float("inf"), help="seconds in all")
    made.add_argument("--only", default="", metavar="REGEX", help="only items in which it is found")
    made.add_argument("--resume", action="store_true", help="skip items that have a line already")
    made.add_argument("--no-build", action="store_true", help="use the native module as it is")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: for tests")
    made.add_argument("--list", action="store_true", help="print the items of the stages")
    made.add_argument("--summary", type=Path, metavar="DIR", help="sum up a run instead of running")
    made.add_argument("--tables", action="store_true", help="with --summary: all that was timed")
    made.add_argument(
        "--results", type=Path, metavar="DIR", help="with --summary: write the results below DIR"
    )
    return made


def missing(device: str = "cuda") -> str | None:
    """What this machine lacks, in one line; None if nothing."""
    absent = [name for name in MODULES if importlib.util.find_spec(name) is None]
    if absent:
        return f"{sys.executable} has no {', '.join(absent)}"
    for name, oldest in OLDEST.items():
        version = metadata.version(name)
        if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < oldest:
            return f"{name} {version} is older than {'.'.join(map(str, oldest))}"
    if device == "cpu":
        return None
    import torch

    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU"
    return None


def make_site() -> None:
    """Link the checkout's files as the installed package has them, with kernels/ inside."""
    package = SITE / "fused_attn"
    shutil.rmtree(SITE, ignore_errors=True)
    package.mkdir(parents=True)
    for path in (ROOT / "fused_attn").iterdir():
        if path.name not in ("__pycache__", "kernels"):
            (package / path.name).symlink_to(path)
    (package / "kernels").symlink_to(ROOT / "kernels")
    (SITE / "benchmarks").symlink_to(ROOT / "benchmarks")


def environment(device: str) -> dict[str, str]:
    """Variables with which the site is imported; on a CPU, Triton interprets the kernels."""
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [path for path in kept.get("PYTHONPATH", "").split(os.pathsep) if path]
    kept["PYTHONPATH"] = os.pathsep.join(dict.fromkeys((str(SITE), *paths)))
    kept["PYTHONSAFEPATH"] = "1"
    # CUDA's tools, where the path lacks them.
    kept["PATH"] = os.pathsep.join((kept.get("PATH", os.defpath), CUDA_TOOLS))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # the processes are the parallelism
        kept.setdefault(name, "1")
    if device == "cpu":
        return kept | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return kept


def built() -> str | None:
    """Why the native module must be built; None if it is there and has CUDA."""
    code = (
        "import torch; from fused_attn import _C; "
        "print('CUDA:' + (_C.cuda_build()['missing'] or ''))"  # None where nothing is missing
    )
    command = [sys.executable, "-c", code]
    kept = environment("cuda")
    done = subprocess.run(command, env=kept, capture_output=True, text=True, timeout=120)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["it cannot be imported"])[-1]
    return done.stdout.strip().rpartition("CUDA:")[2] or None


def build(limit_s: float) -> tuple[bool, str]:
    """Build the native module with CUDA. Returns whether it is there, and the end of the log."""
    absent = [name for name in BUILD_MODULES if importlib.util.find_spec(name) is None]
    kept = environment("cuda")
    if absent or not shutil.which("nvcc", path=kept["PATH"]):
        return False, f"to build it there is no {', '.join(absent) or 'nvcc on the path'}"
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    # setup.py passes FUSED_ATTN_CUDA=AUTO first, and the last value holds.
    arguments = f"-DFUSED_ATTN_CUDA=ON {os.environ.get('CMAKE_ARGS', '')}"
    kept |= {"FUSED_ATTN_REQUIRE_NATIVE": "1", "CMAKE_ARGS": arguments.strip()}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=kept, stdout=log, stderr=subprocess.STDOUT, process_group=0
        )
        try:
            code: int | str = process.wait(timeout=max(limit_s, 1.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = f"stopped after {limit_s:.0f} s, {process.wait()}"
        log.seek(0)
        text = log.read().decode(errors="replace")[-3000:]
    make_site()
    why = built() if code == 0 else f"the build failed: {code}"
    return why is None, text if why is None else f"{why}\n{text}"


def listed(stage: str, options: argparse.Namespace) -> dict[str, list[str]]:
    """The items of a stage by phase, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.targets.gpu.worker", stage, "--list"]
    command += ["--device", options.device, "--lines", str(options.output / f"{stage}.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIST_S)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-600:])
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        phase: [x for x in names if re.search(options.only, x)] for phase, names in found.items()
    }


def done_of(target: Path) -> set[tuple[str, str]]:
    """The items that have a line in a stage's file, except deferred ones, with their phase."""
    from benchmarks.targets.gpu import jsonl

    lines = jsonl.items(jsonl.read(target))
    return {key for key, line in lines.items() if line["outcome"] != "deferred"}


def _run_pool(pool: Any) -> None:
    """Run it. A signal that ends this process ends its workers first."""

    def stop(*_: object) -> None:
        pool.stop()
        sys.exit(143)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        pool.run()
    except KeyboardInterrupt:
        pool.stop()
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


def run_stage(stage: str, limit_s: float, options: argparse.Namespace) -> dict[str, Any]:
    """Run the phases of a stage. Returns its line of run.jsonl."""
    from dataclasses import replace

    from benchmarks.targets.gpu.pool import Job, Pool
    from benchmarks.targets.gpu.worker import module_of

    target = options.output / f"{stage}.jsonl"
    if not options.resume:
        target.unlink(missing_ok=True)
    began = time.monotonic()
    end = min(began + limit_s, options.end)
    if began >= end:
        return {"stage": stage, "error": "no time left"}
    try:
        found = listed(stage, options)
        phases = module_of(stage).PHASES
    except Exception as error:
        return {"stage": stage, "error": f"its items cannot be listed: {error}"[:800]}
    for phase in phases:
        have = done_of(target)
        left = [item for item in found[phase.name] if (phase.name, item) not in have]
        now = time.monotonic()
        job = Job(stage, phase, left, target, now + phase.share * (end - now))
        pool = Pool(replace(job, arguments=("--device", options.device)))
        _run_pool(pool)
    have = done_of(target)
    total = sum(map(len, found.values()))
    done = sum((phase, item) in have for phase, names in found.items() for item in names)
    seconds = round(time.monotonic() - began, 1)
    return {"stage": stage, "items": total, "done": done, "seconds": seconds}


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Make the site and the native module. Returns the first line of run.jsonl."""
    began = time.monotonic()
    make_site()
    why = built()
    line: dict[str, Any] = {"stage": "build", "items": 1, "done": 1}
    if why is None:
        line["note"] = "the native module is there, with CUDA"
    elif options.no_build:
        line |= {"done": 0, "error": f"not built, as asked: {why}"}
    else:
        limit = min(BUILD_S, options.end - time.monotonic())
        passed, text = build(limit)
        line |= {"note": f"built: {why}"} if passed else {"done": 0, "error": text[:3000]}
    return line | {"seconds": round(time.monotonic() - began, 1)}


def run(options: argparse.Namespace) -> int:
    from benchmarks.targets.gpu import jsonl, summary

    options.output.mkdir(parents=True, exist_ok=True)
    record = options.output / "run.jsonl"
    for stage, limit_s in options.stages.items():
        print(f"== {stage}", flush=True)
        line = run_stage(stage, limit_s, options)
        jsonl.append(record, line)
        rest = line.get("error") or f"{line['done']} of {line['items']} items"
        print(f"== {stage}: {rest}, {line.get('seconds', 0):.0f} s", flush=True)
    text, passed = summary.summary(options.output)
    print(text)
    return 0 if passed else 1


def main(arguments: list[str]) -> int:
    """Build, then run inside the site, in the same process."""
    options = parser().parse_args(arguments)
    if isinstance(options.stages, str):
        options.stages = parsed_stages(options.stages)
    options.output = options.output.resolve()
    options.end = time.monotonic() + options.budget
    is_inside = os.environ.get("PYTHONPATH", "").split(os.pathsep)[0] == str(SITE)
    if options.summary is not None or options.list or not is_inside:
        if why := None if options.summary or options.list else missing(options.device):
            print(f"gpu-check: {why}", file=sys.stderr)
            return 1
        if not is_inside:
            return _enter(options, arguments)
    if options.summary is not None:
        from benchmarks.targets.gpu import summary

        text, passed = summary.summary(options.summary)
        print(text)
        if options.tables:
            print(summary.everything(options.summary))
        for path in summary.write(options.summary, options.results) if options.results else ():
            print(path)
        return 0 if passed else 1
    if options.list:
        for stage in options.stages:
            for phase, names in listed(stage, options).items():
                for name in names:
                    print(f"{stage} {phase}: {name}")
        return 0
    return run(options)


def _enter(options: argparse.Namespace, arguments: list[str]) -> int:
    make_site()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.summary is None and not options.list and options.device == "cuda":
        print("== build", flush=True)
        line = prepare(options)
        with (options.output / "run.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"== build: {line.get('note') or line['error'][-1500:]}", flush=True)
    spent = options.budget - (options.end - time.monotonic())
    command = [sys.executable, "-m", "benchmarks.targets.gpu.check", *arguments]
    if options.budget < float("inf"):
        command += ["--budget", f"{max(options.budget - spent, 1.0):.0f}"]
    os.execve(sys.executable, command, environment(options.device))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
