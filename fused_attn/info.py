"""Versions, processor, instruction set and usable backends: ``fused-attn info``."""

from __future__ import annotations

import itertools
import os
import platform
import textwrap
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fused_attn import __version__, backends, packed
from fused_attn.choices import COMPUTE
from fused_attn.problem import AttentionProblem

ENVIRONMENT = ("FUSED_ATTN_BACKEND", "FUSED_ATTN_CPU_ISA")


def collect() -> dict[str, Any]:
    """Return the report as plain values: strings, numbers, None, and lists and dicts of these."""
    return {
        "versions": {
            "fused_attn": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _triton_version(),
        },
        "system": platform.platform(),
        "processor": _processor(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "instruction_set": _instruction_set(),
        "native_cuda": _native_cuda(),
        "backends": {name: _unavailable_reasons(name) for name in backends.BACKENDS},
        "native_decoder": _native_decoder(),
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
    }


def _triton_version() -> str | None:
    for distribution in ("triton", "pytorch-triton"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def _processor() -> str:
    """The processor's name from /proc/cpuinfo, or else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _instruction_set() -> dict[str, Any]:
    """The instruction set that the native code uses, and those that it could use here."""
    try:
        from fused_attn import _C
    except ImportError:
        return {"in_use": None, "supported": []}
    try:
        in_use: str | None = _C.cpu_isa()
    except ValueError:  # FUSED_ATTN_CPU_ISA is not supported here: the cpu backend reports it
        in_use = None
    return {"in_use": in_use, "supported": _C.cpu_isas_supported()}


def _native_cuda() -> dict[str, Any]:
    """The CUDA toolkit and architectures of the native module, or why it has no CUDA code."""
    try:
        from fused_attn import _C
    except ImportError:
        return {"missing": "the native module is missing", "toolkit": None, "architectures": []}
    return dict(_C.cuda_build())


def _unavailable_reasons(name: str) -> list[str]:
    try:
        return backends.unavailable_reasons(name)
    except ValueError as error:  # a bad environment variable fails a call, but not this report
        return [str(error)]


def _native_decoder() -> dict[str, Any]:
    """The types of the native decoder's products, or why decoders run step by step in torch."""
    try:
        reasons = packed.backend_reasons("auto")
    except ValueError as error:
        reasons = [str(error)]
    return {"compute": [] if reasons else list(COMPUTE), "reasons": reasons}


def _table(rows: dict[str, str], indent: str = "") -> list[str]:
    """Lines of name and value, aligned; further lines of a value are indented to match."""
    width = max(map(len, rows)) + 2
    lines = []
    for name, value in rows.items():
        first, *rest = value.splitlines() or [""]
        lines.append(f"{indent}{name:{width}}{first}".rstrip())
        lines += textwrap.indent("\n".join(rest), indent + " " * width).splitlines()
    return lines


def report() -> str:
    """Return the report as text."""
    facts = collect()
    isa = facts["instruction_set"]
    rows = {name: version or "not installed" for name, version in facts["versions"].items()}
    rows["system"] = facts["system"]
    rows["processor"] = facts["processor"]
    rows["gpu"] = ", ".join(facts["gpus"]) or "none"
    rows["threads"] = str(facts["threads"])
    if isa["supported"]:
        possible = ", ".join(isa["supported"])
        rows["instruction set"] = f"{isa['in_use'] or 'none'} (supported here: {possible})"
    else:
        rows["instruction set"] = "none: the native module is missing"
    cuda = facts["native_cuda"]
    architectures = ", ".join(cuda["architectures"])
    rows["native CUDA"] = (
        f"none: {cuda['missing']}"
        if cuda["missing"]
        else f"toolkit {cuda['toolkit']}, for {architectures}"
    )
    usable = {
        name: "not usable: " + "\n".join(reasons) if reasons else "usable"
        for name, reasons in facts["backends"].items()
    }
    native = facts["native_decoder"]
    rows["native decoder"] = (
        "not usable: " + "\n".join(native["reasons"])
        if native["reasons"]
        else f"usable, in {', '.join(native['compute'])}"
    )
    environment = {
        name: "not set" if value is None else value for name, value in facts["environment"].items()
    }
    lines = [*_table(rows), "", "backends", *_table(usable, "  ")]
    return "\n".join([*lines, "", "environment", *_table(environment, "  ")])


def support_table() -> str:
    """Return what each backend supports as a Markdown table.

    The entries come from the backends' `not_supported_reasons`, which also decide about calls. They
    do not depend on whether a backend is available on this machine.
    """
    lines = [
        "| backend | device | dtypes | dot, general | concat | local | gradients | queries T "
        "| widths |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(_support_row, backends.BACKENDS)])


def _support_row(name: str) -> str:
    backend = backends.load(name)
    absent = set(backend.unavailable_reasons())

    def can(device: str, **changes: Any) -> bool:
        asked: dict[str, Any] = {"score": "dot", "queries": 1, "memory_dim": 1} | changes
        sizes = (1, asked.pop("queries"), 1, asked["memory_dim"], asked.pop("memory_dim"))
        score, dtype = asked.pop("score"), asked.pop("dtype", torch.float32)
        problem = AttentionProblem(score, *sizes, dtype, device, **asked)
        return set(backend.not_supported_reasons(problem)) <= absent

    devices = [device for device in ("cpu", "cuda") if can(device)]
    on = devices[-1]
    dtypes = [
        str(dtype).removeprefix("torch.")
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        if can(on, dtype=dtype)
    ]
    concat = "yes" if can(on, score="concat") else "no"
    if concat == "no" and can(on, score="concat", prepared=True):
        concat = "prepared memory"
    cells = [
        *(f"`{name}`", "any" if len(devices) == 2 else on, ", ".join(dtypes)),
        *("yes" if can(on) else "no", concat, "yes" if can(on, windowed=True) else "no"),
        "yes" if can(on, backward=True) else "no",
        _largest(lambda size: can(on, queries=size)),
        _largest(lambda size: can(on, memory_dim=size)),
    ]
    return f"| {' | '.join(cells)} |"


def _largest(can: Callable[[int], bool]) -> str:
    """The largest size that is supported; "any" if 2**20 is, which is beyond any model."""
    if can(1 << 20):
        return "any"
    return f"up to {next(n for n in itertools.count(1) if not can(n + 1))}"


def main() -> int:
    """Print the report."""
    print(report())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
