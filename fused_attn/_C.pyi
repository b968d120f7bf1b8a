"""The native module, defined in csrc/module.cpp."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, TypedDict

from torch import Tensor

from fused_attn.reference import Gradients, MaskingFields, Outputs, Saved

class CudaBuild(TypedDict):
    missing: str | None  # why it has no CUDA code
    toolkit: str | None
    architectures: list[str]  # in CMake's notation

def bind_torch(torch: ModuleType) -> None: ...
def cpu_isa() -> str: ...
def cpu_isas_supported() -> list[str]: ...
def attention_isas_supported() -> list[str]: ...
def set_cpu_isa(name: str) -> None: ...
def multiply_adds(rounds: int, threads: int) -> int: ...
def cuda_build() -> CudaBuild: ...
def identity(parameters: list[dict[str, Tensor | None]]) -> int | None: ...
def sample(parameters: list[dict[str, Tensor | None]]) -> int | None: ...
def search_with(
    step: Callable[[list[int], list[list[int]]], tuple[Any, Any]],
    models: int,
    vocabulary: int,
    beams: int,
    sources: Sequence[int],
    attends: bool,
    options: dict[str, Any],
    sentences: Sequence[tuple[int, int, Sequence[int]]],
) -> list[list[tuple[list[int], float, float, list[float], list[float]]]]: ...
def is_usual(
    query: object, memory: object, memory_lengths: object, memory_mask: object, /
) -> bool: ...
def are_plain(*tensors: object) -> bool: ...
def dot_forward(
    query: Tensor,
    memory: Tensor,
    scale: float,
    masking: MaskingFields,
    return_weights: bool,
    return_logsumexp: bool,
    /,
) -> Outputs: ...
def dot_backward(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    query: Tensor,
    memory: Tensor,
    scale: float,
    masking: MaskingFields,
    saved: Saved,
    wanted: list[bool],
    /,
) -> Gradients: ...
def concat_forward(
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    memory: Tensor,
    masking: MaskingFields,
    return_weights: bool,
    return_logsumexp: bool,
    /,
) -> Outputs: ...
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
    /,
) -> Gradients: ...
def concat_scores(
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    masking: MaskingFields,
    /,
) -> Tensor: ...
def concat_scores_backward(
    grad_scores: Tensor,
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    masking: MaskingFields,
    wanted: list[bool],
    /,
) -> Gradients: ...

class NotNumbersError(ValueError): ...

State = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, int]
Hypothesis = tuple[list[int], float, float, Tensor | None, list[float]]

class PackedModel:
    def __init__(self, spec: dict[str, Any]) -> None: ...
    @property
    def bytes(self) -> int: ...
    def encode(
        self, source: Tensor, source_lengths: Tensor, threads: int
    ) -> tuple[Tensor, Tensor, Tensor | None]: ...
    def run_steps(
        self,
        inputs: Tensor,
        memory: Tensor | None,
        memory_lengths: Tensor | None,
        state: State,
        return_weights: bool,
        threads: int,
    ) -> tuple[Tensor | None, ...]: ...
    def greedy(
        self,
        rows: Tensor,
        memory: Tensor | None,
        memory_lengths: Tensor | None,
        state: State,
        bos: int,
        eos: int,
        steps: int,
        return_weights: bool,
        threads: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]: ...

def search(
    models: list[PackedModel],
    source: Tensor,
    source_lengths: Tensor,
    limits: Tensor,
    prefix: Tensor | None,
    beam: int,
    options: dict[str, Any],
    threads: int,
) -> list[list[Hypothesis]]: ...

# These exist only if cuda_build()["missing"] is None.
def cuda_dot_forward(
    query: Tensor,
    memory: Tensor,
    scale: float,
    masking: MaskingFields,
    return_weights: bool,
    return_logsumexp: bool,
    /,
) -> Outputs: ...
def cuda_concat_forward(
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    memory: Tensor,
    masking: MaskingFields,
    return_weights: bool,
    return_logsumexp: bool,
    /,
) -> Outputs: ...
