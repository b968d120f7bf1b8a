"""The operators: schema, fake and implementation, and nothing else; `autograd` calls them.

`torch.library` define/impl/register_fake: the cheapest registration that torch.compile,
torch.export and FakeTensor understand. A backend is chosen inside the implementation, so a compiler
never traces that choice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_attn import backends, reference
from fused_attn.reference import Outputs

# Defaults let a call leave out its last arguments (see `_options`).
_POSITIONS = "Tensor? memory_lengths=None, Tensor? memory_mask=None"
_WANTED = "bool return_weights=False, bool return_logsumexp=False"
_KEEP = "Tensor? keep_mask=None, float keep_scale=1.0"
_BACKEND = 'str backend="auto"'
_WINDOW = "Tensor? centers=None, float half_width=0.0, bool gaussian=False"
# With it memory is (N, E), the rows of all sequences one after another, and so are its projection
# and their gradients; memory_lengths are offsets (B + 1) then.
_RAGGED = "SymInt? max_source=None"
_OUTPUTS = "(Tensor context, Tensor weights, Tensor logsumexp)"
_SAVED = "Tensor context, Tensor? weights, Tensor logsumexp"
_CONCAT_INPUTS = (
    "Tensor query_proj, Tensor memory_proj, Tensor? memory_exp, Tensor v, Tensor memory"
)

# Of the results of a forward operator, those not asked for are None, as in aten's operators with an
# output mask: a tensor takes 1 us to make, and a decoding step needs the context only. So is the
# gradient of the centers where no Gaussian gives them one.
_library = torch.library.Library("fused_attn", "DEF")
_library.define(
    f"dot_attention(Tensor query, Tensor memory, {_POSITIONS}, {_WANTED}, "
    f"float scale=1.0, {_KEEP}, {_BACKEND}, {_WINDOW}, {_RAGGED}) -> {_OUTPUTS}"
)
_library.define(
    "dot_attention_backward(Tensor? grad_context, Tensor? grad_weights, Tensor query, "
    f"Tensor memory, {_SAVED}, {_POSITIONS}, float scale=1.0, {_KEEP}, {_BACKEND}, {_WINDOW}, "
    f"{_RAGGED}) -> (Tensor grad_query, Tensor grad_memory, Tensor grad_centers)"
)
_library.define(
    f"concat_attention({_CONCAT_INPUTS}, {_POSITIONS}, {_WANTED}, {_KEEP}, {_BACKEND}, {_WINDOW}, "
    f"{_RAGGED}) -> {_OUTPUTS}"
)
_library.define(
    "concat_attention_backward(Tensor? grad_context, Tensor? grad_weights, "
    f"{_CONCAT_INPUTS}, {_SAVED}, {_POSITIONS}, {_KEEP}, {_BACKEND}, {_WINDOW}, {_RAGGED}) "
    "-> (Tensor grad_query_proj, Tensor grad_memory_proj, Tensor grad_v, Tensor grad_memory, "
    "Tensor grad_centers)"
)
_library.define(
    "concat_scores(Tensor query_proj, Tensor memory_proj, Tensor? memory_exp, Tensor v, "
    f"{_POSITIONS}, {_BACKEND}) -> Tensor"
)
_library.define(
    "concat_scores_backward(Tensor grad_scores, Tensor query_proj, Tensor memory_proj, "
    f"Tensor? memory_exp, Tensor v, {_POSITIONS}, {_BACKEND}) "
    "-> (Tensor grad_query_proj, Tensor grad_memory_proj, Tensor grad_v)"
)


def _select(
    query: Tensor,
    memory: Tensor,
    score: str,
    backend: str,
    backward: bool = False,
    prepared: bool = False,
    windowed: bool = False,
) -> backends.Backend:
    if memory.is_cpu:  # the sizes and the device's name would take 0.6 us, and decide nothing
        if windowed:
            return backends.select("cpu", memory.dtype, score, backend, windowed=True)
        return backends.select("cpu", memory.dtype, score, backend)
    sizes = (query.shape[1], memory.shape[2], query.shape[2])
    kind = (memory.device.type, memory.dtype, score, backend)
    return backends.select(*kind, sizes, backward, prepared, windowed)


def _masking(
    lengths: Tensor | None,
    mask: Tensor | None,
    keep: Tensor | None,
    keep_scale: float,
    centers: Tensor | None,
    half_width: float,
    gaussian: bool,
) -> reference.MaskingFields:
    window = None if centers is None else (centers, half_width, gaussian)
    return (lengths, mask, keep, keep_scale, window)


def _ragged(
    chosen: backends.Backend, offsets: Tensor | None, longest: int, *tensors: Tensor | None
) -> tuple[Any, ...]:
    """Lengths and what has a row for each of the memory, as the backend takes them."""
    if offsets is None:
        raise ValueError("memory_lengths must be offsets (B + 1) where max_source is given")
    if getattr(chosen, "TAKES_OFFSETS", False):
        return (offsets, longest), *tensors
    padded = (None if t is None else reference.pad_rows(t, offsets, longest) for t in tensors)
    return offsets.diff(), *padded


def _unpadded(grads: reference.Gradients, offsets: Any) -> reference.Gradients:
    """Gradients (B, S, width) of the memory and of its projection as those of rows (N, width)."""
    query, *rest = grads
    return query, *(
        reference.unpad_rows(g, offsets) if g is not None and g.dim() == 3 else g for g in rest
    )


def _dot_forward(
    query: Tensor,
    memory: Tensor,
    memory_lengths: Tensor | None = None,
    memory_mask: Tensor | None = None,
    return_weights: bool = False,
    return_logsumexp: bool = False,
    scale: float = 1.0,
    keep_mask: Tensor | None = None,
    keep_scale: float = 1.0,
    backend: str = "auto",
    centers: Tensor | None = None,
    half_width: float = 0.0,
    gaussian: bool = False,
    max_source: int | None = None,
) -> Outputs:
    chosen = _select(query, memory, "dot", backend, windowed=centers is not None)
    if max_source is not None:
        memory_lengths, memory = _ragged(chosen, memory_lengths, max_source, memory)
    window = (centers, half_width, gaussian)
    masking = _masking(memory_lengths, memory_mask, keep_mask, keep_scale, *window)
    return chosen.dot_forward(query, memory, scale, masking, return_weights, return_logsumexp)


def _dot_backward(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    query: Tensor,
    memory: Tensor,
    context: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor,
    memory_lengths: Tensor | None = None,
    memory_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_mask: Tensor | None = None,
    keep_scale: float = 1.0,
    backend: str = "auto",
    centers: Tensor | None = None,
    half_width: float = 0.0,
    gaussian: bool = False,
    max_source: int | None = None,
) -> reference.Gradients:
    windowed = centers is not None
    chosen = _select(query, memory, "dot", backend, backward=True, windowed=windowed)
    lengths: Any = memory_lengths
    if max_source is not None:
        lengths, memory = _ragged(chosen, memory_lengths, max_source, memory)
    window = (centers, half_width, gaussian)
    masking = _masking(lengths, memory_mask, keep_mask, keep_scale, *window)
    saved = (context, weights, logsumexp)
    grads = chosen.dot_backward(grad_context, grad_weights, query, memory, scale, masking, saved)
    return grads if max_source is None else _unpadded(grads, memory_lengths)


def _concat_forward(
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    memory: Tensor,
    memory_lengths: Tensor | None = None,
    memory_mask: Tensor | None = None,
    return_weights: bool = False,
    return_logsumexp: bool = False,
    keep_mask: Tensor | None = None,
    keep_scale: float = 1.0,
    backend: str = "auto",
    centers: Tensor | None = None,
    half_width: float = 0.0,
    gaussian: bool = False,
    max_source: int | None = None,
) -> Outputs:
    kinds = {"prepared": memory_exp is not None, "windowed": centers is not None}
    chosen = _select(query_proj, memory, "concat", backend, **kinds)
    if max_source is not None:
        rows = (memory_proj, memory_exp, memory)
        found = _ragged(chosen, memory_lengths, max_source, *rows)
        memory_lengths, memory_proj, memory_exp, memory = found
    window = (centers, half_width, gaussian)
    masking = _masking(memory_lengths, memory_mask, keep_mask, keep_scale, *window)
    inputs = (query_proj, memory_proj, memory_exp, v, memory)
    return chosen.concat_forward(*inputs, masking, return_weights, return_logsumexp)


def _concat_backward(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    memory: Tensor,
    context: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor,
    memory_lengths: Tensor | None = None,
    memory_mask: Tensor | None = None,
    keep_mask: Tensor | None = None,
    keep_scale: float = 1.0,
    backend: str = "auto",
    centers: Tensor | None = None,
    half_width: float = 0.0,
    gaussian: bool = False,
    max_source: int | None = None,
) -> reference.Gradients:
    kinds = {"prepared": memory_exp is not None, "windowed": centers is not None}
    chosen = _select(query_proj, memory, "concat", backend, backward=True, **kinds)
    lengths: Any = memory_lengths
    if max_source is not None:
        rows = (memory_proj, memory_exp, memory)
        found = _ragged(chosen, memory_lengths, max_source, *rows)
        lengths, memory_proj, memory_exp, memory = found
    window = (centers, half_width, gaussian)
    masking = _masking(lengths, memory_mask, keep_mask, keep_scale, *window)
    inputs = (query_proj, memory_proj, memory_exp, v, memory)
    saved = (context, weights, logsumexp)
    grads = chosen.concat_backward(grad_context, grad_weights, *inputs, masking, saved)
    return grads if max_source is None else _unpadded(grads, memory_lengths)


def _concat_scores(
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    memory_lengths: Tensor | None = None,
    memory_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    chosen = _select(query_proj, memory_proj, "scores", backend)
    masking = (memory_lengths, memory_mask, None, 1.0, None)
    return chosen.concat_scores(query_proj, memory_proj, memory_exp, v, masking)


def _concat_scores_backward(
    grad_scores: Tensor,
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    memory_lengths: Tensor | None = None,
    memory_mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    chosen = _select(query_proj, memory_proj, "scores", backend, backward=True)
    masking = (memory_lengths, memory_mask, None, 1.0, None)
    inputs = (query_proj, memory_proj, memory_exp, v)
    return chosen.concat_scores_backward(grad_scores, *inputs, masking)


def _fake_outputs(
    query: Tensor,
    memory: Tensor,
    return_weights: bool,
    return_logsumexp: bool,
    max_source: int | None,
) -> Outputs:
    batch, queries, _ = query.shape
    source, width = memory.shape[1] if max_source is None else max_source, memory.shape[-1]
    statistics = reference.arithmetic_dtype(memory.dtype)
    return (
        memory.new_empty((batch, queries, width)),
        memory.new_empty((batch, queries, source)) if return_weights else None,
        memory.new_empty((batch, queries), dtype=statistics) if return_logsumexp else None,
    )


def _empty(like: Tensor) -> Tensor:
    return like.new_empty(like.shape)


def _dot_fake(
    query: Tensor,
    memory: Tensor,
    memory_lengths: Any = None,
    memory_mask: Any = None,
    return_weights: bool = False,
    return_logsumexp: bool = False,
    scale: float = 1.0,
    keep_mask: Any = None,
    keep_scale: float = 1.0,
    backend: str = "auto",
    centers: Any = None,
    half_width: float = 0.0,
    gaussian: bool = False,
    max_source: int | None = None,
) -> Outputs:
    return _fake_outputs(query, memory, return_weights, return_logsumexp, max_source)


def _centers_fake(centers: Tensor | None, gaussian: bool) -> Tensor | None:
    return _empty(centers) if centers is not None and gaussian else None


def _dot_backward_fake(
    grad_context: Any,
    grad_weights: Any,
    query: Tensor,
    memory: Tensor,
    context: Any,
    weights: Any,
    logsumexp: Any,
    memory_lengths: Any = None,
    memory_mask: Any = None,
    scale: float = 1.0,
    keep_mask: Any = None,
    keep_scale: float = 1.0,
    backend: str = "auto",
    centers: Tensor | None = None,
    half_width: float = 0.0,
    gaussian: bool = False,
    max_source: int | None = None,
) -> reference.Gradients:
    return _empty(query), _empty(memory), _centers_fake(centers, gaussian)


def _concat_fake(
    query_proj: Tensor,
    memory_proj: Any,
    memory_exp: Any,
    v: Any,
    memory: Tensor,
    memory_lengths: Any = None,
    memory_mask: Any = None,
    return_weights: bool = False,
    return_logsumexp: bool = False,
    keep_mask: Any = None,
    keep_scale: float = 1.0,
    backend: str = "auto",
    centers: Any = None,
    half_width: float = 0.0,
    gaussian: bool = False,
    max_source: int | None = None,
) -> Outputs:
    return _fake_outputs(query_proj, memory, return_weights, return_logsumexp, max_source)


def _concat_backward_fake(
    grad_context: Any,
    grad_weights: Any,
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Any,
    v: Tensor,
    memory: Tensor,
    context: Any,
    weights: Any,
    logsumexp: Any,
    memory_lengths: Any = None,
    memory_mask: Any = None,
    keep_mask: Any = None,
    keep_scale: float = 1.0,
    backend: str = "auto",
    centers: Tensor | None = None,
    half_width: float = 0.0,
    gaussian: bool = False,
    max_source: int | None = None,
) -> reference.Gradients:
    inputs = (query_proj, memory_proj, v, memory)
    return *(_empty(tensor) for tensor in inputs), _centers_fake(centers, gaussian)


def _concat_scores_fake(query_proj: Tensor, memory_proj: Tensor, *rest: Any) -> Tensor:
    shape = (*query_proj.shape[:2], memory_proj.shape[1])
    return query_proj.new_empty(shape, dtype=reference.arithmetic_dtype(query_proj.dtype))


def _concat_scores_backward_fake(
    grad_scores: Any,
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Any,
    v: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return _empty(query_proj), _empty(memory_proj), _empty(v)


for _name, _implementation, _fake in (
    ("dot_attention", _dot_forward, _dot_fake),
    ("dot_attention_backward", _dot_backward, _dot_backward_fake),
    ("concat_attention", _concat_forward, _concat_fake),
    ("concat_attention_backward", _concat_backward, _concat_backward_fake),
    ("concat_scores", _concat_scores, _concat_scores_fake),
    ("concat_scores_backward", _concat_scores_backward, _concat_scores_backward_fake),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_attn::{_name}", _fake, lib=_library)
