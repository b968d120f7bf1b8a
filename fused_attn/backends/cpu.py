"""SIMD C++ on the CPU (csrc/cpu): the native module takes the tensors and creates the outputs."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch  # before _C: both then share the OpenMP runtime that torch loads

from fused_attn.problem import AttentionProblem

TAKES_OFFSETS = True  # reads a memory (N, E) of concatenated sequences in place
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

native: Any
try:
    from fused_attn import _C as native

    native.bind_torch(torch)  # raises ImportError for a torch whose tensors it cannot read
except ImportError as error:
    native, _import_error = None, str(error)


@cache
def unavailable_reasons() -> list[str]:
    if native is None:
        note = Path(__file__).parent.parent / "_native_build_error.txt"
        why = note.read_text(encoding="utf-8").strip() if note.exists() else _import_error
        return [f"the native module fused_attn._C is not there: {why}"]
    native.cpu_isa()  # raises, naming FUSED_ATTN_CPU_ISA, if this machine cannot run that
    return []


def not_supported_reasons(problem: AttentionProblem) -> list[str]:
    reasons = list(unavailable_reasons())
    if problem.device_type != "cpu":
        reasons.append(f"it runs on the cpu, not on {problem.device_type}")
    if problem.dtype not in _DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        reasons.append(f"dtype {problem.dtype} is not one of {names}")
    return reasons


def is_slower(problem: AttentionProblem) -> bool:
    return False


# The backend's functions are those of the native module: a Python wrapper would cost 0.15 us.
dot_forward = getattr(native, "dot_forward", None)
dot_backward = getattr(native, "dot_backward", None)
concat_forward = getattr(native, "concat_forward", None)
concat_backward = getattr(native, "concat_backward", None)
concat_scores = getattr(native, "concat_scores", None)
concat_scores_backward = getattr(native, "concat_scores_backward", None)
