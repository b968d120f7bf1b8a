"""Launches that bypass Triton's front end, which takes 20 us to find a kernel launched before.

Triton compiles a kernel for the constants, the types of the arguments, which pointers are multiples
of 16, and the values of integers; for the integers listed in `NUMBERS` only for their size, 32 or
64 bits. A `Bound` kernel keeps what Triton compiled under exactly that key, and launches it with
the call that ends Triton's own `JITFunction.run`. Nothing depends on it: if Triton's launcher takes
other arguments than those known here, in the interpreter, and while hooks observe launches or
compilations, the kernel is launched as Triton's documentation says.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from triton import knobs
from triton.runtime import JITFunction, driver

# The parameters of `CompiledKernel.run`: of Triton 3.6, and of 3.9. AMD's are the same.
_PLACE = ("gridX", "gridY", "gridZ", "stream", "function")
_HOOKS = ("kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook")
_KNOWN = ((*_PLACE, "args"), (*_PLACE, *_HOOKS, "args"))

Numbers = tuple[int | float, ...]
# A compiled kernel, which owns the module it loaded; its launcher, function and packed metadata.
_Ready = tuple[Any, Callable[..., None], Any, Any]


def _is_watched(kernel: Any) -> bool:
    """Whether hooks observe launches or compilations, or may do so in an unknown version."""
    runtime = knobs.runtime
    for chain in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if chain is not None and getattr(chain, "calls", True):
            return True
    hooks = getattr(kernel, "pre_run_hooks", True)
    return bool(hooks) or getattr(runtime, "add_stages_inspection_hook", True) is not None


def _ready(compiled: Any) -> _Ready | None:
    """The parts that launch a compiled kernel, if its launcher is one that is known here."""
    try:
        found = (compiled, compiled.run, compiled.function, compiled.packed_metadata)
        names = tuple(inspect.signature(found[1]).parameters)
    except (AttributeError, TypeError, ValueError):
        return None
    return found if names in _KNOWN else None


class Bound:
    """A kernel with its constants. Its parameters are pointers, then numbers, then constants."""

    def __init__(self, kernel: Any, options: dict[str, Any]) -> None:
        self.kernel, self.options = kernel, options
        self._is_compiled = isinstance(kernel, JITFunction)
        self._ready: dict[Any, _Ready | None] = {}
        names = getattr(kernel, "arg_names", ())
        # A launcher ignores the constants, but they have places among its arguments.
        self._constants = (None,) * sum(name in options for name in names)

    def __call__(
        self, programs: tuple[int, ...], tensors: tuple[Tensor | None, ...], numbers: Numbers
    ) -> None:
        """Launch it on the current stream of the current device."""
        if not self._is_compiled:
            self.kernel[programs](*tensors, *numbers, **self.options)
            return
        active: Any = driver.active
        device = active.get_current_device()
        bits: int = 0
        types: list[Any] = [device]  # becomes the key
        for x in tensors:
            if x is None:
                types.append(None)
            else:
                bits |= x.data_ptr()
                types.append(x.dtype)
        if bits & 15:
            types.append(tuple([x is None or x.data_ptr() % 16 == 0 for x in tensors]))
        if not max(numbers) < 2**31:  # also if one is NaN
            types += "int64", tuple([isinstance(x, int) and x >= 2**31 for x in numbers])
        key = tuple(types)
        ready = self._ready.get(key)
        if ready is None or _is_watched(self.kernel):
            compiled = self.kernel[programs](*tensors, *numbers, **self.options)
            if key not in self._ready:
                self._ready[key] = _ready(compiled)
            return
        _, run, function, metadata = ready
        rows = programs[1] if len(programs) > 1 else 1
        stream = active.get_current_stream(device)
        place = (programs[0], rows, 1, stream, function, metadata, None, None, None)
        run(*place, *tensors, *numbers, *self._constants)


_BOUND: dict[tuple[Any, ...], Bound] = {}


def bound(kernel: Any, options: dict[str, Any]) -> Bound:
    """The kernel with these constants and compiler options: one `Bound` in the process."""
    key = (id(kernel), *options, *options.values())  # hashing the kernel takes a lock, and 1 us
    found = _BOUND.get(key)
    if found is None:
        found = _BOUND[key] = Bound(kernel, options)  # keeps the kernel, so its id is not reused
    return found
