"""The native module: csrc/module.cpp."""

from types import ModuleType

from torch import Tensor

from fused_attn.reference import MaskingFields, Outputs, Saved

def bind_torch(torch: ModuleType) -> None: ...
def cpu_isa() -> str: ...
def cpu_isas_supported() -> list[str]: ...
def set_cpu_isa(name: str) -> None: ...
def multiply_adds(rounds: int, threads: int) -> int: ...
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
    /,
) -> tuple[Tensor, Tensor]: ...
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
    /,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
