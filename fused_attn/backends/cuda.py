"""CUDA C++ for a decoding step (csrc/cuda): a few queries, and a memory that is read once."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import torch  # before _C: both then share the OpenMP runtime that torch loads

from fused_attn.problem import AttentionProblem

MOST_QUERIES = 8
LARGEST_WIDTH = 2048
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

native: Any
try:
    from fused_attn import _C as native

    native.bind_torch(torch)  # raises ImportError for a torch whose tensors it cannot read
except ImportError as error:
    native, _import_error = None, str(error)


def built_without() -> str | None:
    """Why the native module has no CUDA in it, or None."""
    if native is None:
        return f"the native module fused_attn._C is not there: {_import_error}"
    missing = native.cuda_build()["missing"]
    return f"the native module was built without CUDA: {missing}" if missing else None


def can_run(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether code for ``architectures`` (in CMake's notation) runs on a GPU of ``capability``.

    Machine code ("-real") runs on the same major and later minor versions, code for the driver to
    compile ("-virtual") on all later versions; without a suffix an architecture is both.
    """
    major, minor = capability
    for name in architectures:
        found = re.fullmatch(r"(\d+)(\d)[af]?(-real|-virtual)?", name)
        if found is None:  # "native", "all": unknown here; CUDA reports a missing kernel
            return True
        built, kind = (int(found[1]), int(found[2])), found[3]
        if kind != "-virtual" and built[0] == major and built[1] <= minor:
            return True
        if kind != "-real" and built <= (major, minor):
            return True
    return False


@cache
def unavailable_reasons() -> list[str]:
    if why := built_without():
        return [why]
    if torch.version.cuda is None:
        return [f"this torch ({torch.__version__}) is built without CUDA"]
    if not torch.cuda.is_available():
        return ["torch finds no CUDA GPU"]
    architectures = native.cuda_build()["architectures"]
    # All GPUs must be supported, because a problem does not say which one it is on.
    return [
        f"GPU {number} ({torch.cuda.get_device_name(number)}) has the compute capability "
        f"{capability[0]}.{capability[1]}, and the native module is built for "
        f"{', '.join(architectures)}"
        for number in range(torch.cuda.device_count())
        if not can_run(capability := torch.cuda.get_device_capability(number), architectures)
    ]


def not_supported_reasons(problem: AttentionProblem) -> list[str]:
    reasons = list(unavailable_reasons())
    if problem.device_type != "cuda":
        reasons.append(f"it runs on cuda, not on {problem.device_type}")
    if problem.dtype not in _DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        reasons.append(f"dtype {problem.dtype} is not one of {names}")
    if problem.backward:
        reasons.append("it has no backward: it is for decoding, one step at a time")
        return reasons
    if problem.queries > MOST_QUERIES:
        reasons.append(f"it takes up to {MOST_QUERIES} queries, not {problem.queries}")
    for name, width in (("memory", problem.memory_dim), ("score", problem.score_dim)):
        if width > LARGEST_WIDTH:
            reasons.append(f"the {name} is {width} wide, and it takes up to {LARGEST_WIDTH}")
    if problem.score == "scores":
        reasons.append("it has no scores without a softmax")
    if problem.windowed:
        reasons.append("it has no windows (local attention)")
    if problem.score == "concat" and not problem.prepared:
        reasons.append("concat needs a prepared memory, with its exponentials")
    return reasons


def is_slower(problem: AttentionProblem) -> bool:
    """With many queries matrix units are faster: they need one pass over the memory.

    Measured on an H200 in bfloat16, (64, T, 1024, D): see benchmarks/results.
    """
    if problem.dtype == torch.float32:
        return False
    is_long_row = problem.memory_dim > 512
    if problem.score == "concat":
        return is_long_row and problem.queries > 4
    return problem.queries > 2 or (problem.queries == 2 and not is_long_row)


def dot_backward(*arguments: Any) -> Any:
    raise NotImplementedError("the cuda backend has no backward")


concat_backward = concat_scores = concat_scores_backward = dot_backward
# The backend's functions are those of the native module: a Python wrapper would cost 0.15 us.
dot_forward = getattr(native, "cuda_dot_forward", None)
concat_forward = getattr(native, "cuda_concat_forward", None)
