"""The native module: csrc/module.cpp. Addresses are those of tensors; see attention_params.h."""

from typing import TypeAlias

_Sizes: TypeAlias = tuple[int, int, int, int, int]  # B, T, S, E, K
_Rows: TypeAlias = tuple[int, int, int]  # address, stride of the batch, stride of a row
# lengths, mask, its three strides, keep, keep_scale
_Masking: TypeAlias = tuple[int, int, int, int, int, int, float]
_Saved: TypeAlias = tuple[int, int, int]  # context, weights, logsumexp
_Concat: TypeAlias = tuple[_Rows, _Rows, int, int]  # memory_proj, memory_exp, its dtype, v
# grad_context, grad_weights; grad_query, grad_memory, grad_memory_proj, grad_v
_Grads: TypeAlias = tuple[_Rows, _Rows, int, int, int, int]

def cpu_isa() -> str: ...
def cpu_isas_supported() -> list[str]: ...
def set_cpu_isa(name: str) -> None: ...
def multiply_adds(rounds: int, threads: int) -> int: ...
def dot_forward(
    dtype: int,
    sizes: _Sizes,
    threads: int,
    query: _Rows,
    memory: _Rows,
    masking: _Masking,
    saved: _Saved,
    scale: float,
    /,
) -> None: ...
def dot_backward(
    dtype: int,
    sizes: _Sizes,
    threads: int,
    query: _Rows,
    memory: _Rows,
    masking: _Masking,
    saved: _Saved,
    scale: float,
    grads: _Grads,
    /,
) -> None: ...
def concat_forward(
    dtype: int,
    sizes: _Sizes,
    threads: int,
    query: _Rows,
    memory: _Rows,
    masking: _Masking,
    saved: _Saved,
    concat: _Concat,
    /,
) -> None: ...
def concat_backward(
    dtype: int,
    sizes: _Sizes,
    threads: int,
    query: _Rows,
    memory: _Rows,
    masking: _Masking,
    saved: _Saved,
    concat: _Concat,
    grads: _Grads,
    /,
) -> None: ...
