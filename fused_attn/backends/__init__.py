"""The choice of a backend for a call. Backends never import each other; each reports its limits."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from fused_attn.problem import AttentionProblem
from fused_attn.reference import Gradients, MaskingFields, Outputs, Saved

BACKENDS = ("cpu", "cuda", "triton", "eager")  # in the order "auto" tries them
REQUESTS = ("auto", *BACKENDS)


class Backend(Protocol):
    """A backend module. Outputs of all backends have the same shapes, dtypes and strides.

    Forward returns context, weights and log-sum-exp, None for those not asked for, and raises
    ValueError for a length outside 0..S (lengths on a GPU are not read back to check them).
    Backward takes the ``saved`` outputs, and returns a gradient for each differentiable input, in
    the inputs' order, then one for the centers of a Gaussian window. ``wanted`` has a bool for
    each: a gradient that is not wanted is None, and costs nothing.

    A backend whose module has ``TAKES_OFFSETS`` also takes a memory (N, E) of concatenated
    sequences, with a pair (offsets (B + 1), longest) in place of the lengths; for other backends it
    is padded.
    """

    def unavailable_reasons(self) -> list[str]:
        """Why nothing can run here, in sentences; empty when the backend is usable."""

    def not_supported_reasons(self, problem: AttentionProblem) -> list[str]:
        """Why this problem cannot run, in sentences, availability included."""

    def is_slower(self, problem: AttentionProblem) -> bool:
        """Whether a later backend was measured to be faster: "auto" then prefers that one."""

    def dot_forward(
        self,
        query: Tensor,
        memory: Tensor,
        scale: float,
        masking: MaskingFields,
        return_weights: bool,
        return_logsumexp: bool,
    ) -> Outputs: ...

    def dot_backward(
        self,
        grad_context: Tensor | None,
        grad_weights: Tensor | None,
        query: Tensor,
        memory: Tensor,
        scale: float,
        masking: MaskingFields,
        saved: Saved,
        wanted: list[bool],
    ) -> Gradients: ...

    def concat_forward(
        self,
        query_proj: Tensor,
        memory_proj: Tensor,
        memory_exp: Tensor | None,
        v: Tensor,
        memory: Tensor,
        masking: MaskingFields,
        return_weights: bool,
        return_logsumexp: bool,
    ) -> Outputs: ...

    def concat_backward(
        self,
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
    ) -> Gradients: ...

    def concat_scores(
        self,
        query_proj: Tensor,
        memory_proj: Tensor,
        memory_exp: Tensor | None,
        v: Tensor,
        masking: MaskingFields,
    ) -> Tensor:
        """Scores (B, T, S) in the dtype of the arithmetic, -inf at masked positions."""

    def concat_scores_backward(
        self,
        grad_scores: Tensor,
        query_proj: Tensor,
        memory_proj: Tensor,
        memory_exp: Tensor | None,
        v: Tensor,
        masking: MaskingFields,
        wanted: list[bool],
    ) -> Gradients:
        """Gradients of the two projections and of v, None for those that are not ``wanted``."""


def load(name: str) -> Backend:
    """Return the backend module of that name."""
    return cast(Backend, import_module(f"fused_attn.backends.{name}"))


def unavailable_reasons(name: str) -> list[str]:
    """Why the backend ``name`` cannot run on this machine at all; empty when it can."""
    return load(name).unavailable_reasons()


def check_request(backend: object, source: str = "backend") -> str:
    """Return ``backend`` if it is a known name; the ValueError otherwise names ``source``."""
    if not isinstance(backend, str) or backend not in REQUESTS:
        names = ", ".join(repr(name) for name in REQUESTS)
        raise ValueError(f"{source} must be one of {names}, got {backend!r}")
    return backend


def default_request() -> str:
    """Return what "auto" means here: FUSED_ATTN_BACKEND, "auto" if it is not set."""
    asked = os.environ.get("FUSED_ATTN_BACKEND") or "auto"
    return check_request(asked, "the environment variable FUSED_ATTN_BACKEND")


@cache
def select(
    device_type: str,
    dtype: torch.dtype,
    score: str,
    requested: str = "auto",
    sizes: tuple[int, int, int] = (1, 1, 1),
    backward: bool = False,
    prepared: bool = False,
    windowed: bool = False,
) -> Backend:
    """Return the backend for this kind of call. A request by name never falls back to another.

    ``auto`` takes FUSED_ATTN_BACKEND if that is set, else the first backend that supports the
    problem and was not measured to be slower than a later one. The variable is read once per kind
    of call, not on every call. ``sizes`` are T, E and the width of the score; no backend needs them
    on a CPU. ``score`` may be "scores": those of concat without a softmax.
    """
    if requested == "auto":
        requested = default_request()
    queries, memory_dim, score_dim = sizes
    problem = AttentionProblem(
        *(score, 1, queries, 1, memory_dim, score_dim, dtype, device_type),
        backward=backward,
        prepared=prepared,
        windowed=windowed,
    )
    objections: dict[str, list[str]] = {}
    slower: list[Backend] = []
    # On a CPU Triton's kernels are interpreted, for tests: "auto" never prefers that.
    order = sorted(BACKENDS, key=lambda name: name == "triton" and device_type == "cpu")
    for name in order if requested == "auto" else (requested,):
        backend = load(name)
        objections[name] = backend.not_supported_reasons(problem)
        if objections[name]:
            continue
        if requested != "auto" or not backend.is_slower(problem):
            return backend
        slower.append(backend)
    if slower:
        return slower[0]
    lines = [f"  {name}: {'; '.join(reasons)}" for name, reasons in objections.items()]
    call = f"{score} attention on {device_type} in {str(dtype).removeprefix('torch.')}"
    raise ValueError(f"no backend can do {call} (backend={requested!r}):\n" + "\n".join(lines))
