"""Every check of an argument: what it may be, and the sentence that says what it was instead.

A call that is as it mostly is passes `is_usual` at once; any other goes through the checks, which
raise TypeError or ValueError and name the argument, what was expected and what came.
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from fused_attn import backends, reference
from fused_attn.backends import cpu
from fused_attn.reference import LocalWindow, Masking, arithmetic_dtype, pad_rows

_KNOWN_BACKENDS = frozenset(backends.REQUESTS)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Without the native module nothing is in a hurry: all calls go through the checks.
_is_usual: Any = cpu.native.is_usual if cpu.native is not None else lambda *call: False
_are_plain: Any = cpu.native.are_plain if cpu.native is not None else lambda *tensors: False
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def is_usual(
    query: Tensor,
    memory: Tensor,
    memory_lengths: Tensor | None,
    memory_mask: Tensor | None,
    window: LocalWindow | None,
    dropout_p: float,
) -> bool:
    """Whether the checks below would accept these, widths aside, and change nothing.

    They say what is wrong, and together take as long as a decoding step of eager attention; this
    takes a tenth of that. False decides nothing: the checks must follow. Only for the CPU.
    """
    if window is not None or dropout_p != 0.0 or torch.is_autocast_enabled("cpu"):
        return False
    if torch.compiler.is_compiling():
        return False
    return bool(_is_usual(query, memory, memory_lengths, memory_mask))


def is_plain(tensor: Tensor, dtype: torch.dtype, dims: int) -> bool:
    """Whether this is an ordinary tensor on the CPU, of that dtype and number of dimensions."""
    return (
        tensor is not None
        and not torch.compiler.is_compiling()
        and bool(_are_plain(tensor))
        and tensor.dtype is dtype
        and tensor.is_cpu
        and tensor.dim() == dims
    )


def padded(memory: Any, memory_lengths: Tensor | None) -> tuple[Any, Tensor | None]:
    """Return a memory of rows of different lengths as (B, S, E) and lengths; any other as it is.

    Such is a `PackedSequence`, as torch.nn's recurrent layers return it (its order undone), and a
    nested tensor of jagged layout (B, j, E).
    """
    is_packed = isinstance(memory, PackedSequence)
    if not is_packed and not (isinstance(memory, Tensor) and memory.is_nested):
        return memory, memory_lengths
    kind = "a PackedSequence" if is_packed else "a nested Tensor"
    if memory_lengths is not None:
        raise ValueError(f"memory_lengths must be None with {kind} as memory, which has its own")
    if is_packed:
        rows, lengths = pad_packed_sequence(memory, batch_first=True)
        return rows, lengths.to(rows.device)
    if memory.layout is not torch.jagged or memory.dim() != 3:
        raise TypeError(
            "memory must have the jagged layout and shape (B, j, E) if it is nested, got "
            f"{memory.layout} and {memory.dim()} dimensions"
        )
    with_holes = memory.lengths()
    lengths = memory.offsets().diff() if with_holes is None else with_holes
    if with_holes is None and (_knows_longest(memory) or torch.compiler.is_compiling()):
        return memory.to_padded_tensor(0.0), lengths
    longest = int(lengths.max()) if lengths.numel() else 0
    if with_holes is None:
        return memory.to_padded_tensor(0.0, (len(lengths), longest, memory.shape[2])), lengths
    return pad_rows(memory.values(), memory.offsets(), longest), lengths


def _knows_longest(memory: Any) -> bool:
    """Whether a jagged tensor knows its longest sequence; torch pads others to the rows of all."""
    return getattr(memory, "_max_seqlen_tensor", None) is not None


def autocast(*tensors: Any) -> Any:
    """Cast floating tensors to the autocast dtype, if autocast is on; float64 stays as it is."""
    device = next((t.device.type for t in tensors if isinstance(t, Tensor)), "cpu")
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta has no autocast to ask
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype)
        if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        else t
        for t in tensors
    )


def check_backend(backend: object) -> None:
    """Refuse an unknown backend name."""
    if backend not in _KNOWN_BACKENDS:
        backends.check_request(backend)


def check_scale(scale: object) -> None:
    """Refuse a scale that is neither a number nor a tensor of one element."""
    if type(scale) is float:
        return
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            raise ValueError(f"scale must be a number or one element, got shape {_shape(scale)}")
    elif not isinstance(scale, Real):
        raise TypeError(f"scale must be a number or a Tensor of one element, got {scale!r}")


def number(name: str, value: Any, expected: str = "a number") -> float:
    """Return a real number as float: Python's or NumPy's, and not a bool."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {expected}, got {value!r}")
    return float(value)


def integer(value: Any) -> int | None:
    """Return an integer as int: Python's or NumPy's, and not a bool; None for anything else."""
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    return int(value) if is_integer else None


def probability(name: str, value: Any) -> float:
    """Return a number in 0..1 as float."""
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a probability in 0..1, got {value!r}")
    chance = float(value)
    if not 0.0 <= chance <= 1.0:
        raise ValueError(f"{name} must be a probability in 0..1, got {value}")
    return chance


def _check_float(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        hint = ""
        if isinstance(tensor, torch.fx.Proxy):
            hint = ": torch.fx.symbolic_trace does not see through the operators, torch.export does"
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}{hint}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense (strided) Tensor, got layout {tensor.layout}")
    if tensor.dtype not in _FLOATS:
        expected = ", ".join(_short(dtype) for dtype in _FLOATS)
        raise TypeError(
            f"{name} must have one of the dtypes {expected}, got {_short(tensor.dtype)}"
        )


def _check_like(name: str, tensor: Tensor, memory: Tensor) -> None:
    if tensor.dtype != memory.dtype:
        raise TypeError(
            f"{name} must have the dtype of memory, {_short(memory.dtype)}, "
            f"got {_short(tensor.dtype)}"
        )
    _check_device(name, tensor, memory)


def _check_device(name: str, tensor: Tensor, memory: Tensor) -> None:
    if tensor.device != memory.device:
        raise ValueError(
            f"{name} must be on the device of memory, {memory.device}, got {tensor.device}"
        )


def _kind(value: object) -> str:
    return _short(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def check_memory(memory: Tensor) -> None:
    """Refuse a memory that is not a floating (B, S, E) with E of at least 1."""
    _check_float("memory", memory)
    if memory.dim() != 3 or memory.shape[2] == 0:
        raise ValueError(f"memory must have shape (B, S, E) with E >= 1, got {_shape(memory)}")


def check_parameter(
    name: str, tensor: Tensor, memory: Tensor, shape: tuple[int | None, ...], letters: str
) -> None:
    """Refuse a weight whose shape differs from ``shape``, in which None stands for any size."""
    _check_float(name, tensor)
    fits = tensor.dim() == len(shape) and all(
        size >= 1 and wanted in (None, size)
        for size, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        sizes = ["any" if size is None else str(size) for size in shape]
        wanted_shape = f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"
        raise ValueError(f"{name} must have shape {letters} = {wanted_shape}, got {_shape(tensor)}")
    _check_like(name, tensor, memory)


def check_query(query: Tensor, memory: Tensor, partner: str, width: int) -> None:
    """Refuse a query that is not (B, T, width) or (B, width), with memory's B, dtype and device."""
    _check_float("query", query)
    if query.dim() not in (2, 3) or query.shape[-1] != width or query.shape[0] != memory.shape[0]:
        batch = memory.shape[0]
        raise ValueError(
            f"query must have shape ({batch}, T, {width}) or ({batch}, {width}) "
            f"to go with memory {_shape(memory)} and the width of {partner}, got {_shape(query)}"
        )
    _check_like("query", query, memory)


def check_concat(
    query: Tensor,
    memory: Tensor,
    query_weight: Tensor,
    memory_weight: Tensor,
    v: Tensor,
    bias: Tensor | None,
) -> None:
    """Refuse operands of the concat score that do not go together."""
    check_memory(memory)
    check_parameter("v", v, memory, (None,), "(A,)")
    width = v.shape[0]
    check_parameter("query_weight", query_weight, memory, (width, None), "(A, D)")
    check_parameter("memory_weight", memory_weight, memory, (width, memory.shape[2]), "(A, E)")
    if bias is not None:
        check_parameter("bias", bias, memory, (width,), "(A,)")
    check_query(query, memory, "query_weight", query_weight.shape[1])


def check_masking(
    query: Tensor,
    memory: Tensor,
    memory_lengths: Tensor | None,
    memory_mask: Tensor | None,
    window: LocalWindow | None,
    dropout_p: float,
) -> Masking:
    """Check what decides which positions count, and draw the dropout of the weights."""
    lengths = check_lengths(memory_lengths, memory)
    queries = query.shape[1] if query.dim() == 3 else 1
    mask = check_mask(memory_mask, memory, queries)
    dropout_p = probability("dropout_p", dropout_p)
    if window is not None:
        window = check_window(window, query, memory)
    if dropout_p == 0.0:
        return Masking(lengths, mask, window=window)
    batch, source, _ = memory.shape
    keep = torch.rand(batch, queries, source, device=memory.device) >= dropout_p
    scale = 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
    return Masking(lengths, mask, keep, scale, window)


def check_window(window: object, query: Tensor, memory: Tensor) -> LocalWindow:
    """Return the window with centers (B, T) in the dtype of the arithmetic."""
    if not isinstance(window, LocalWindow):
        raise TypeError(f"window must be a LocalWindow or None, got {type(window).__name__}")
    centers, half_width, gaussian = window
    if not isinstance(centers, Tensor) or not centers.is_floating_point():
        raise TypeError(f"window.centers must be a floating-point Tensor, got {_kind(centers)}")
    if centers.shape != query.shape[:-1]:
        raise ValueError(
            f"window.centers must have shape {tuple(query.shape[:-1])}, one for each query, "
            f"got {_shape(centers)}"
        )
    _check_device("window.centers", centers, memory)
    half_width = number("window.half_width", half_width)
    least = "positive (its sigma is half_width / 2)" if gaussian else "at least 0"
    if not (0 < half_width < float("inf") or (half_width == 0 and not gaussian)):
        raise ValueError(f"window.half_width must be finite and {least}, got {half_width}")
    centers = centers.to(arithmetic_dtype(memory.dtype))
    if query.dim() == 2:
        centers = centers.unsqueeze(1)
    return LocalWindow(centers, half_width, bool(gaussian))


def check_lengths(memory_lengths: Tensor | None, memory: Tensor) -> Tensor | None:
    """Return the lengths, int (B,). Values outside 0..S are refused when the call runs.

    The operators do that, and `check_bounds` where there is none.
    """
    if memory_lengths is None:
        return None
    if not isinstance(memory_lengths, Tensor) or memory_lengths.dtype not in _INTEGERS:
        raise TypeError(f"memory_lengths must be an integer Tensor, got {_kind(memory_lengths)}")
    if memory_lengths.shape != memory.shape[:1]:
        raise ValueError(
            f"memory_lengths must have shape (B,) = ({memory.shape[0]},), "
            f"got {_shape(memory_lengths)}"
        )
    _check_device("memory_lengths", memory_lengths, memory)
    return memory_lengths


def check_bounds(lengths: Tensor | None, memory: Tensor) -> None:
    """Refuse checked lengths outside 0..S, for what no operator follows that would.

    Where a compiler or a transform looks on, and on GPUs, they are not read.
    """
    if (
        lengths is None
        or type(lengths) is not Tensor
        or torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._functorch.is_functorch_wrapped_tensor(lengths)
        or torch._C._len_torch_dispatch_stack()
    ):
        return
    reference.check_lengths(lengths, memory)


def check_mask(memory_mask: Tensor | None, memory: Tensor, queries: int) -> Tensor | None:
    """Return the mask, bool (B, S) or (B, 1 or T, S)."""
    if memory_mask is None:
        return None
    if not isinstance(memory_mask, Tensor) or memory_mask.dtype != torch.bool:
        kind = _kind(memory_mask)
        raise TypeError(f"memory_mask must be a bool Tensor (True = attend), got {kind}")
    batch, source, _ = memory.shape
    if memory_mask.shape not in ((batch, source), (batch, 1, source), (batch, queries, source)):
        raise ValueError(
            f"memory_mask must have shape (B, S) = ({batch}, {source}), (B, 1, S) or (B, T, S) = "
            f"({batch}, {queries}, {source}), got {_shape(memory_mask)}"
        )
    _check_device("memory_mask", memory_mask, memory)
    return memory_mask
