"""Luong attention as functions: what the arguments mean, and every check of them.

Score, mask, softmax and weighted sum happen in one pass over the memory, forward and backward, in
whichever backend is chosen. Luong, Pham & Manning 2015, "Effective Approaches to Attention-based
Neural Machine Translation", section 3.1.

Arguments that all functions share
    memory_lengths: int (B,), 0..S. Positions at and after a row's length do not count.
    memory_mask: bool (B, S), (B, 1, S) or (B, T, S). **True = attend**, as in
        `scaled_dot_product_attention`; `nn.MultiheadAttention` means the opposite. With lengths
        given too, a position counts when both allow it.
    window: reserved for local attention; only None so far.
    dropout_p: probability of dropping a weight from the weighted sum, 0..1.
    return_weights: also return the alignment weights (before dropout).
    backend: "auto", or the name of a backend, which then must be able to do the call.

Rules that all backends keep
    Positions that do not count are never read into a result or a gradient, whatever they hold; the
    gradient of their memory is 0. A query with nothing to attend to gives context 0, weights 0 and
    zero gradients. Softmax and sums are float32 for float32, bfloat16 and float16 inputs and
    float64 for float64. The same input gives the same bits, forward and backward.

Raises
    TypeError: an argument has the wrong type or dtype. ValueError: a wrong rank, shape, device or
    value. The message names the argument, what was expected and what came.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fused_attn import backends, ops
from fused_attn.reference import Masking, MaskingFields, zero_uncounted_rows

_KNOWN_BACKENDS = frozenset(backends.REQUESTS)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN = (Tensor, torch.nn.Parameter)  # not a subclass, whose attributes may be anything
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def dot_attention(
    query: Tensor,
    memory: Tensor,
    *,
    scale: float | Tensor = 1.0,
    memory_lengths: Tensor | None = None,
    memory_mask: Tensor | None = None,
    window: None = None,
    dropout_p: float = 0.0,
    return_weights: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Attend with the score ``scale * h_t . h_s`` (Luong et al. 2015, eq. 8, dot).

    query: (B, T, E), or (B, E) for one step.
    memory: (B, S, E), the encoder states; keys and values in one.
    scale: a number, or a tensor of one element if it is learned.

    Returns the context (B, T, E) and the weights (B, T, S) or None; (B, E) and (B, S) for a 2-D
    query. See the module's text for the other arguments, the rules and the errors.
    """
    check_backend(backend)
    check_scale(scale)
    masking: MaskingFields
    if (
        is_usual(query, memory, memory_lengths, memory_mask, window, dropout_p)
        and query.shape[-1] == memory.shape[2]
    ):
        masking = (memory_lengths, memory_mask, None, 1.0)
    else:
        query, memory = autocast(query, memory)
        check_memory(memory)
        check_query(query, memory, "memory", memory.shape[2])
        masking = check_masking(query, memory, memory_lengths, memory_mask, window, dropout_p)
    return attend_dot(query, memory, scale, masking, return_weights, backend)


def general_attention(
    query: Tensor,
    memory: Tensor,
    weight: Tensor,
    *,
    scale: float | Tensor = 1.0,
    memory_lengths: Tensor | None = None,
    memory_mask: Tensor | None = None,
    window: None = None,
    dropout_p: float = 0.0,
    return_weights: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Attend with the score ``scale * h_t^T W_a h_s`` (Luong et al. 2015, eq. 8, general).

    query: (B, T, D), or (B, D) for one step.
    memory: (B, S, E), the encoder states; keys and values in one.
    weight: (D, E), the paper's W_a. It is applied to the T queries, not to the S memory rows.

    Returns as `dot_attention`; the module's text has the other arguments, the rules and the errors.
    """
    check_backend(backend)
    check_scale(scale)
    masking: MaskingFields
    if (
        is_usual(query, memory, memory_lengths, memory_mask, window, dropout_p)
        and _is_plain(weight, memory.dtype, 2)
        and weight.shape == (query.shape[-1], memory.shape[2])
    ):
        masking = (memory_lengths, memory_mask, None, 1.0)
    else:
        query, memory, weight = autocast(query, memory, weight)
        check_memory(memory)
        check_parameter("weight", weight, memory, (None, memory.shape[2]), "(D, E)")
        check_query(query, memory, "weight", weight.shape[0])
        masking = check_masking(query, memory, memory_lengths, memory_mask, window, dropout_p)
    return attend_dot(query @ weight, memory, scale, masking, return_weights, backend)


def concat_attention(
    query: Tensor,
    memory: Tensor,
    query_weight: Tensor,
    memory_weight: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    memory_lengths: Tensor | None = None,
    memory_mask: Tensor | None = None,
    window: None = None,
    dropout_p: float = 0.0,
    return_weights: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Attend with ``v^T tanh(W_q h_t + W_m h_s + b)`` (Luong et al. 2015, eq. 8, concat).

    query: (B, T, D), or (B, D) for one step.
    memory: (B, S, E), the encoder states.
    query_weight, memory_weight: (A, D) and (A, E); side by side they are the paper's W_a.
    v: (A,), the paper's v_a.
    bias: (A,), as in Bahdanau's additive attention; None for the paper's form.

    Nothing of size (B, T, S, A) is built, unless the eager backend runs the call. Returns as
    `dot_attention`; the module's text has the other arguments, the rules and the errors.
    """
    check_backend(backend)
    masking: MaskingFields
    if (
        is_usual(query, memory, memory_lengths, memory_mask, window, dropout_p)
        and _is_plain(v, memory.dtype, 1)
        and _is_plain(query_weight, memory.dtype, 2)
        and _is_plain(memory_weight, memory.dtype, 2)
        and v.shape[0] > 0
        and query_weight.shape == (v.shape[0], query.shape[-1])
        and memory_weight.shape == (v.shape[0], memory.shape[2])
        and (bias is None or (_is_plain(bias, memory.dtype, 1) and bias.shape == v.shape))
    ):
        masking = (memory_lengths, memory_mask, None, 1.0)
    else:
        query, memory, query_weight, memory_weight, v, bias = autocast(
            query, memory, query_weight, memory_weight, v, bias
        )
        check_memory(memory)
        check_parameter("v", v, memory, (None,), "(A,)")
        width = v.shape[0]
        check_parameter("query_weight", query_weight, memory, (width, None), "(A, D)")
        check_parameter("memory_weight", memory_weight, memory, (width, memory.shape[2]), "(A, E)")
        if bias is not None:
            check_parameter("bias", bias, memory, (width,), "(A,)")
        check_query(query, memory, "query_weight", query_weight.shape[1])
        masking = check_masking(query, memory, memory_lengths, memory_mask, window, dropout_p)
    query_proj = linear(query, query_weight, bias)
    memory_proj = linear(zero_uncounted_rows(memory, masking), memory_weight)
    return attend_concat(query_proj, memory_proj, None, v, memory, masking, return_weights, backend)


def attend_dot(
    query: Tensor,
    memory: Tensor,
    scale: float | Tensor,
    masking: MaskingFields,
    return_weights: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """Run the dot operator on checked arguments; query (B, T, E) or (B, E)."""
    # The type first: asked about a number, isinstance(..., Tensor) takes 0.3 us.
    if type(scale) is not float and isinstance(scale, Tensor):
        # A learned scale gets its gradient through the query, which is small.
        query, scale = query * scale.reshape(()).to(query.dtype), 1.0
    if query.dim() == 3:
        return ops.dot_attention(query, memory, float(scale), *masking, return_weights, backend)
    query = query.unsqueeze(1)
    return _one_step(
        *ops.dot_attention(query, memory, float(scale), *masking, return_weights, backend)
    )


def attend_concat(
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    memory: Tensor,
    masking: MaskingFields,
    return_weights: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """Run the concat operator on checked arguments; query_proj (B, T, A) or (B, A)."""
    rest = (memory_proj, memory_exp, v, memory)
    if query_proj.dim() == 3:
        return ops.concat_attention(query_proj, *rest, *masking, return_weights, backend)
    query_proj = query_proj.unsqueeze(1)
    return _one_step(*ops.concat_attention(query_proj, *rest, *masking, return_weights, backend))


def _one_step(context: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return context.squeeze(1), None if weights is None else weights.squeeze(1)


def is_usual(
    query: Tensor,
    memory: Tensor,
    memory_lengths: Tensor | None,
    memory_mask: Tensor | None,
    window: None,
    dropout_p: float,
) -> bool:
    """Whether the checks below would accept these, widths aside, and change nothing.

    They say what is wrong, and together take as long as a decoding step of eager attention; this
    takes a fifth of that, written out for the two tensors because calls would double it. False
    decides nothing: the checks must follow.
    """
    if not (
        type(query) is Tensor
        and type(memory) is Tensor
        and memory.dim() == 3
        and query.dim() in (2, 3)
        and memory.dtype in _FLOATS
        and query.dtype is memory.dtype
        and memory.is_cpu
        and query.is_cpu
        and memory.layout is torch.strided
        and query.layout is torch.strided
        and window is None
        and dropout_p == 0.0
        and not torch.is_autocast_enabled("cpu")
    ):
        return False
    batch, source, width = memory.shape
    sizes = query.shape
    queries = sizes[1] if len(sizes) == 3 else 1
    return (
        sizes[0] == batch
        and width > 0
        and sizes[-1] > 0
        and (memory_lengths is None or _is_lengths(memory_lengths, batch))
        and (memory_mask is None or _is_mask(memory_mask, batch, queries, source))
    )


def _is_lengths(lengths: Tensor, batch: int) -> bool:
    is_integer = isinstance(lengths, Tensor) and lengths.dtype in _INTEGERS
    return is_integer and _is_plain(lengths, lengths.dtype, 1) and lengths.shape[0] == batch


def _is_mask(mask: Tensor, batch: int, queries: int, source: int) -> bool:
    if not (_is_plain(mask, torch.bool, 2) or _is_plain(mask, torch.bool, 3)):
        return False
    return mask.shape in ((batch, source), (batch, 1, source), (batch, queries, source))


def _is_plain(tensor: Tensor, dtype: torch.dtype, dims: int) -> bool:
    return (
        type(tensor) in _PLAIN
        and tensor.dtype is dtype
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and tensor.dim() == dims
    )


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
    elif not isinstance(scale, int | float):
        raise TypeError(f"scale must be a number or a Tensor of one element, got {scale!r}")


def _check_float(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
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


def check_masking(
    query: Tensor,
    memory: Tensor,
    memory_lengths: Tensor | None,
    memory_mask: Tensor | None,
    window: None,
    dropout_p: float,
) -> Masking:
    """Check what decides which positions count, and draw the dropout of the weights."""
    if window is not None:
        raise NotImplementedError("window (local attention) is not implemented yet; use None")
    lengths = check_lengths(memory_lengths, memory)
    queries = query.shape[1] if query.dim() == 3 else 1
    mask = check_mask(memory_mask, memory, queries)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be a probability in 0..1, got {dropout_p}")
    if dropout_p == 0.0:
        return Masking(lengths, mask)
    batch, source, _ = memory.shape
    keep = torch.rand(batch, queries, source, device=memory.device) >= dropout_p
    return Masking(lengths, mask, keep, 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0)


def check_lengths(memory_lengths: Tensor | None, memory: Tensor) -> Tensor | None:
    """Return the lengths, int (B,). Values outside 0..S are refused when the call runs."""
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
