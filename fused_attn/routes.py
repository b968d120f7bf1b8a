"""How a call must be made: it depends on the compilers, transforms, modes and traces of torch."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

DIRECT, OPERATOR, COMPOSED = range(3)

# Whether a torch.func transform (vmap, grad, jvp) is active. torch.compile can trace this call.
_transformed: Any = torch._C._are_functorch_transforms_active
_modes: Any = torch._C._len_torch_dispatch_stack  # FakeTensorMode, FlopCounterMode, make_fx
_function_modes: Any = torch._C._len_torch_function_stack
_function_mode_stack: Any = torch.overrides._get_current_function_mode_stack
_trace: Any = torch._C._get_tracing_state  # of torch.jit.trace
_profiled: Any = torch._C._autograd._profiler_enabled


def route() -> int:
    """How a call must be made. Takes 0.4 us.

    ``COMPOSED`` (of ATen operators) under a torch.func transform, in forward-mode AD and in a trace
    for ONNX or TorchScript. ``OPERATOR`` (through the dispatcher) under a compiler, a dispatch or
    function mode, or a profiler. Otherwise ``DIRECT``.
    """
    if torch.compiler.is_compiling():
        is_onnx = torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()
        return COMPOSED if is_onnx or is_transformed() else OPERATOR
    if _transformed() or forward_ad._current_level >= 0 or _trace() is not None:
        return COMPOSED
    return OPERATOR if _modes() or _function_modes() or _profiled() else DIRECT


def is_transformed() -> bool:
    """Whether a torch.func transform or forward-mode AD is active."""
    return _transformed() or forward_ad._current_level >= 0


def is_watched() -> bool:
    """Whether something must see every tensor operation of a call.

    That is a torch.func transform, forward-mode AD, a trace, or a dispatch or function mode except
    that of `torch.set_default_device`. A profiler need not see them.
    """
    if is_transformed() or _trace() is not None or _modes():
        return True
    modes = _function_mode_stack() if _function_modes() else []
    return any(type(mode) is not DeviceContext for mode in modes)
