"""The checks of arguments and their error messages.

A common call is accepted by the fast check `is_usual`. Any other call goes through the checks
below, which raise TypeError or ValueError with the name of the argument, what was expected and what
was given.
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
# Without the native module there is no fast path: all calls go through the checks.
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
    """Whether the checks below would accept these arguments unchanged, apart from their widths.

    The checks together take as long as a decoding step of eager attention; this takes a tenth of
    that. False does not mean that an argument is wrong: the checks must follow, and say what is.
    Always False for tensors that are not on the CPU.
    """
    if window is not None or dropout_p != 0.0 or torch.is_autocast_enabled("cpu"):
        return False
    if torch.compiler.is_compiling():
        return False
    return bool(_is_usual(query, memory, memory_lengths, memory_mask))


def is_plain(tensor: Tensor, dtype: torch.dtype, dims: int) -> bool:
    """Whether this is an ordinary CPU tensor with that dtype and number of dimensions."""
    return (
        tensor is not None
        and not torch.compiler.is_compiling()
        and bool(_are_plain(tensor))
        and tensor.dtype is dtype
        and tensor.is_cpu
        and tensor.dim() == dims
    )


def padded(memory: Any, memory_lengths: Tensor | None) -> tuple[Any, Tensor | None]:
    """Return a ragged memory as a padded (B, S, E) with lengths, and any other unchanged.

    A ragged memory is a `PackedSequence`, as torch.nn's recurrent layers return it (the rows come
    back in the original order), or a nested tensor (B, j, E) with jagged layout.
    """
    is_packed = isinstance(memory, PackedSequence)
    if not is_packed and not (isinstance(memory, Tensor) and memory.is_nested):
        return memory, memory_lengths
    kind = "a PackedSequence" if is_packed else "a nested Tensor"
    if memory_lengths is not None:
        raise ValueError(f"memory_lengths must be None if memory is {kind}, which has its own")
    if is_packed:
        rows, lengths = pad_packed_sequence(memory, batch_first=True)
        return rows, lengths.to(rows.device)
    if memory.layout is not torch.jagged or memory.dim() != 3:
        raise TypeError(
            "a nested memory must have the jagged layout and shape (B, j, E), got "
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
    """Whether a jagged tensor stores its maximum length; torch pads others to the total length."""
    return getattr(memory, "_max_seqlen_tensor", None) is not None


def autocast(*tensors: Any) -> Any:
    """Cast floating-point tensors to the autocast dtype if autocast is on; float64 is not cast."""
    device = next((t.device.type for t in tensors if isinstance(t, Tensor)), "cpu")
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta does not support autocast
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype)
        if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        else t
        for t in tensors
    )


def check_backend(backend: object) -> None:
    """Raise ValueError for an unknown backend name."""
    if backend not in _KNOWN_BACKENDS:
        backends.check_request(backend)


def check_scale(scale: object) -> None:
    """Raise unless scale is a number or a Tensor of one element."""
    if type(scale) is float:
        return
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            raise ValueError(
                f"scale must be a number or a Tensor of one element, got shape {_shape(scale)}"
            )
    elif not isinstance(scale, Real):
        raise TypeError(f"scale must be a number or a Tensor of one element, got {scale!r}")


def number(name: str, value: Any, expected: str = "a number") -> float:
    """Return a real number (Python's or NumPy's, not a bool) as a float; TypeError otherwise."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {expected}, got {value!r}")
    return float(value)


def integer(value: Any) -> int | None:
    """Return an integer (Python's or NumPy's, not a bool) as an int; None for anything else."""
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    return int(value) if is_integer else None


def probability(name: str, value: Any) -> float:
    """Return a number in 0..1 as a float; TypeError or ValueError for anything else."""
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
            hint = ": use torch.export, torch.fx.symbolic_trace cannot trace the operators"
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
    """Raise unless memory is a floating-point Tensor (B, S, E) with E >= 1."""
    _check_float("memory", memory)
    if memory.dim() != 3 or memory.shape[2] == 0:
        raise ValueError(f"memory must have shape (B, S, E) with E >= 1, got {_shape(memory)}")


def check_parameter(
    name: str, tensor: Tensor, memory: Tensor, shape: tuple[int | None, ...], letters: str
) -> None:
    """Raise unless a weight has ``shape`` (None means any size) and memory's dtype and device.

    ``letters`` is the symbolic shape for the message, such as "(A, D)".
    """
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
    """Raise unless query is (B, T, width) or (B, width), with memory's B, dtype and device.

    ``partner`` is the argument that sets the width, for the message.
    """
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
    """Raise unless the operands of the concat score fit together."""
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
    """Check lengths, mask and window, and draw the dropout mask of the weights."""
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
    """Return the checked window, with centers (B, T) in the dtype of the arithmetic."""
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
    """Return the checked lengths, int (B,), or None.

    The values are not read here: the operators raise for lengths outside 0..S, and so does
    `check_bounds` where no operator runs.
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
    """Raise if lengths are outside 0..S, for code paths where no operator checks this.

    Values are not read on a GPU, under a compiler or mode, or in a transform.
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
    """Return the checked mask, bool (B, S), (B, 1, S) or (B, T, S), or None."""
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
