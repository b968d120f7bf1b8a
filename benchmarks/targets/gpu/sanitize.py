"""The stage "sanitize": small calls under compute-sanitizer.

``python -m benchmarks.targets.gpu.sanitize CALLS DEVICE`` makes the calls that the tool watches.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.targets.gpu.pool import Phase
from benchmarks.targets.gpu.worker import die_with_parent

PHASES = (Phase("tools", jobs=4, limit_s=80.0, start_s=30.0),)
CALLS = ("cuda-dot", "cuda-concat", "triton-step", "triton-online", "triton-rows", "triton-concat")
# Filters of racecheck by mangled name: the cuda backend's kernels have `decode` in theirs.
RACED = {"cuda-dot": "decode", "cuda-concat": "decode"}
OPTIONS = ("--error-exitcode", "9", "--print-limit", "5")


def items(phase: str, options: argparse.Namespace) -> list[str]:
    if options.device == "cpu":
        return ["none triton-step"]  # the calls without a tool
    return [*(f"memcheck {calls}" for calls in CALLS), *(f"racecheck {calls}" for calls in RACED)]


def command(item: str, device: str) -> list[str]:
    tool, calls = item.split(" ")
    called = [sys.executable, "-m", "benchmarks.targets.gpu.sanitize", calls, device]
    if tool == "none":
        return called
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    filters = ["--kernel-regex", f"kns={RACED[calls]}"] if tool == "racecheck" else []
    return [sanitizer, "--tool", tool, *OPTIONS, *filters, *called]


def run(phase: str, item: str, options: argparse.Namespace) -> dict[str, Any]:
    # Without the caching allocator, inside whose blocks nothing is out of bounds.
    kept = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        command(item, options.device),
        env=kept, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        preexec_fn=die_with_parent,
    )  # fmt: skip
    return verdict(done.returncode, done.stdout)


def verdict(code: int, output: str) -> dict[str, Any]:
    """The fields of a line: it passed if the calls were made and the tool found nothing."""
    tool = [line for line in output.splitlines() if line.startswith("=========")]
    errors = [line.removeprefix("=========").strip() for line in tool]
    found = [line for line in errors if line and "COMPUTE-SANITIZER" not in line]
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", output)
    if code == 0 and "calls made" in output:
        return {"tool": summary[-1] if summary else "no summary"}
    shown = (found or output.strip().splitlines()[-1:] or [f"exit code {code}"])[0]
    text = "\n".join(found[:12]) if found else output[-600:]
    return {"outcome": "failed", "error": shown[:300], "code": code, "text": text[:900]}


def call(calls: str, device: str) -> int:
    """Make the calls of a group. Returns the exit code."""
    import torch

    from benchmarks.targets.gpu.cases import cuda
    from benchmarks.targets.gpu.smoke import step
    from fused_attn import testing
    from fused_attn.testing import Case

    backend, kind = calls.split("-")
    cases: Sequence[Case]
    if backend == "cuda":
        score = "projected" if kind == "concat" else "dot"
        cases = [case for case in cuda() if case.score == score and case.source < 1000]
        cases = cases[::4]
    else:
        sizes = {"step": ("dot", 1, 200, 96), "online": ("dot", 20, 200, 256),
                 "rows": ("dot", 20, 100, 37), "concat": ("projected", 20, 100, 64)}  # fmt: skip
        score, queries, source, width = sizes[kind]
        given = (torch.bfloat16, 3, queries, source, width, width, width)
        cases = [Case(score, *given, lengths=True, mask=mask) for mask in ("none", "row")]
        if device == "cpu":
            cases = [Case(score, torch.bfloat16, 2, 1, 9, 16, 16, 16, lengths=True)]
    for case in cases:
        inputs = testing.make_inputs(case, device=device)
        got = step(inputs) if backend == "cuda" else testing.fused(inputs, backend)
        float(got["context"].float().sum())
    print("calls made")
    return 0


if __name__ == "__main__":
    sys.exit(call(*sys.argv[1:]))
