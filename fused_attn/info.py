"""What runs here: versions, the processor and its instruction set, and each backend or why not."""

from __future__ import annotations

import os
import platform
import textwrap
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fused_attn import __version__, backends

ENVIRONMENT = ("FUSED_ATTN_BACKEND", "FUSED_ATTN_CPU_ISA")


def collect() -> dict[str, Any]:
    """Return the facts as plain values: strings, numbers, lists and dicts of them, and None."""
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
    """The processor's name as the kernel gives it; the architecture where it gives none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _instruction_set() -> dict[str, Any]:
    """The one that the native code uses and those it could use; nothing without native code."""
    try:
        from fused_attn import _C
    except ImportError:
        return {"in_use": None, "supported": []}
    try:
        in_use: str | None = _C.cpu_isa()
    except ValueError:  # FUSED_ATTN_CPU_ISA asks for the impossible: the cpu backend says so
        in_use = None
    return {"in_use": in_use, "supported": _C.cpu_isas_supported()}


def _native_cuda() -> dict[str, Any]:
    """What the native module was compiled with for GPUs, or why it was not."""
    try:
        from fused_attn import _C
    except ImportError:
        return {"missing": "the native module is not there", "toolkit": None, "architectures": []}
    return dict(_C.cuda_build())


def _unavailable_reasons(name: str) -> list[str]:
    try:
        return backends.unavailable_reasons(name)
    except ValueError as error:  # a bad environment variable stops a call, but not this report
        return [str(error)]


def _table(rows: dict[str, str], indent: str = "") -> list[str]:
    """Aligned lines of name and value; the further lines of a value stand under its first."""
    width = max(map(len, rows)) + 2
    lines = []
    for name, value in rows.items():
        first, *rest = value.splitlines() or [""]
        lines.append(f"{indent}{name:{width}}{first}".rstrip())
        lines += textwrap.indent("\n".join(rest), indent + " " * width).splitlines()
    return lines


def report() -> str:
    """Return the facts as text for a person."""
    facts = collect()
    isa = facts["instruction_set"]
    rows = {name: version or "not installed" for name, version in facts["versions"].items()}
    rows["system"] = facts["system"]
    rows["processor"] = facts["processor"]
    rows["gpu"] = ", ".join(facts["gpus"]) or "none"
    rows["threads"] = str(facts["threads"])
    if isa["supported"]:
        possible = ", ".join(isa["supported"])
        rows["instruction set"] = f"{isa['in_use'] or 'none'} (possible here: {possible})"
    else:
        rows["instruction set"] = "none: the native module is not there"
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
    environment = {
        name: "not set" if value is None else value for name, value in facts["environment"].items()
    }
    lines = [*_table(rows), "", "backends", *_table(usable, "  ")]
    return "\n".join([*lines, "", "environment", *_table(environment, "  ")])


def main() -> int:
    """Print the report."""
    print(report())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
