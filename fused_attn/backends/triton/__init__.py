"""Triton kernels on a GPU: `call` lays out arguments, `forward` and `backward` launch `kernels/`.

With TRITON_INTERPRET=1 in the environment the kernels run in Triton's interpreter, also on CPU
tensors. That is slow; it is how their arithmetic is tested on machines without a GPU. The sizes of
all workspaces depend on shapes alone, nothing waits for the GPU, and nothing is tuned at run time,
so that a CUDA graph can capture every call once its kernels are compiled.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from fused_attn import operands
from fused_attn.backends.triton import interpreter
from fused_attn.problem import AttentionProblem
from fused_attn.reference import Gradients, MaskingFields, Outputs, Saved

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (3, 6)
LARGEST_WINDOW_WIDTH = 2048  # the window kernels hold whole rows in registers


@cache
def unavailable_reasons() -> list[str]:
    if importlib.util.find_spec("triton") is None:
        return ["the package triton is not installed"]
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        return [f"triton {triton.__version__} is older than {oldest}"]
    if not interpreter.INTERPRETED and not torch.cuda.is_available():
        return ["there is no GPU that torch can use, and TRITON_INTERPRET=1 is not set"]
    return []


def not_supported_reasons(problem: AttentionProblem) -> list[str]:
    reasons = list(unavailable_reasons())
    if problem.device_type != "cuda" and not (
        interpreter.INTERPRETED and problem.device_type == "cpu"
    ):
        reasons.append(f"it runs on cuda, not on {problem.device_type}")
    if problem.dtype not in _DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        reasons.append(f"dtype {problem.dtype} is not one of {names}")
    widest = max(problem.memory_dim, problem.score_dim)
    if problem.windowed and widest > LARGEST_WINDOW_WIDTH:
        reasons.append(
            f"with a window memory and score may be {LARGEST_WINDOW_WIDTH} wide, not {widest}"
        )
    return reasons


def is_slower(problem: AttentionProblem) -> bool:
    """Library GEMMs are faster in float32, and for many overlapping windows.

    On an H200 at (64, 64, 1024, 512): float32 takes 3.1 times as long as eager (1.9 with the
    backward), windows of 65 rows 1.35 (1.77). See benchmarks/results.
    """
    if problem.score == "concat" or problem.score == "scores":
        return False
    if problem.windowed:
        return problem.queries > 32
    return problem.dtype == torch.float32 and problem.queries > 8


# The modules that launch kernels import triton, which takes a second: calls import them.


def dot_forward(
    query: Tensor,
    memory: Tensor,
    scale: float,
    masking: MaskingFields,
    return_weights: bool,
    return_logsumexp: bool,
) -> Outputs:
    operands.check_dot(query, memory, masking)
    from fused_attn.backends.triton import forward

    return forward.dot(query, memory, scale, masking, return_weights, return_logsumexp)


def dot_backward(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    query: Tensor,
    memory: Tensor,
    scale: float,
    masking: MaskingFields,
    saved: Saved,
    wanted: list[bool],
) -> Gradients:
    operands.check_dot(query, memory, masking)
    operands.check_grad_outputs(grad_context, grad_weights, saved, query, memory, wanted, 3)
    from fused_attn.backends.triton import backward

    grad_outputs = (grad_context, grad_weights)
    return backward.dot(*grad_outputs, query, memory, scale, masking, saved, wanted)


def concat_forward(
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    memory: Tensor,
    masking: MaskingFields,
    return_weights: bool,
    return_logsumexp: bool,
) -> Outputs:
    operands.check_concat(query_proj, memory_proj, memory_exp, v, memory, masking)
    from fused_attn.backends.triton import forward

    inputs = (query_proj, memory_proj, memory_exp, v, memory)
    return forward.concat(*inputs, masking, return_weights, return_logsumexp)


def concat_backward(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    memory: Tensor,
    masking: MaskingFields,
    saved: Saved,
    wanted: list[bool],
) -> Gradients:
    operands.check_concat(query_proj, memory_proj, memory_exp, v, memory, masking)
    operands.check_grad_outputs(grad_context, grad_weights, saved, query_proj, memory, wanted, 5)
    from fused_attn.backends.triton import backward

    grad_outputs, projections = (grad_context, grad_weights), (query_proj, memory_proj)
    return backward.concat(*grad_outputs, *projections, v, memory, masking, saved, wanted)


def concat_scores(
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    masking: MaskingFields,
) -> Tensor:
    operands.check_scores(query_proj, memory_proj, memory_exp, v, masking)
    from fused_attn.backends.triton import forward

    return forward.concat_scores(query_proj, memory_proj, v, masking)


def concat_scores_backward(
    grad_scores: Tensor,
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    masking: MaskingFields,
    wanted: list[bool],
) -> Gradients:
    operands.check_scores(query_proj, memory_proj, memory_exp, v, masking)
    operands.check_grad_scores(grad_scores, query_proj, memory_proj, wanted)
    from fused_attn.backends.triton import backward

    return backward.concat_scores(grad_scores, query_proj, memory_proj, v, masking, wanted)
