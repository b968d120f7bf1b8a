"""The operators: schemas and implementations. `fakes` has the shapes, `autograd` the derivatives.

They are registered with `torch.library` define/impl/register_fake, the cheapest way that
torch.compile, torch.export and FakeTensor understand. The backend is chosen inside the
implementation, so a compiler never traces that choice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_attn import backends, fakes, operands, reference
from fused_attn.backends import eager
from fused_attn.reference import Outputs

# Defaults let a call leave out its last arguments (see `autograd._options`).
_POSITIONS = "Tensor? memory_lengths=None, Tensor? memory_mask=None"
_WANTED = "bool return_weights=False, bool return_logsumexp=False"
_KEEP = "Tensor? keep_mask=None, float keep_scale=1.0"
_BACKEND = 'str backend="auto"'
_WINDOW = "Tensor? centers=None, float half_width=0.0, bool gaussian=False"
# With max_source, memory is (N, E): the rows of all sequences one after another. Its projection and
# the gradients of both have the same form, and memory_lengths are the offsets (B + 1,).
_RAGGED = "SymInt? max_source=None"
_OUTPUTS = "(Tensor context, Tensor? weights, Tensor? logsumexp)"
_GRAD_OUTPUTS = "Tensor? grad_context, Tensor? grad_weights, Tensor? grad_logsumexp"
_SAVED = "Tensor context, Tensor? weights, Tensor logsumexp"
_CONCAT_INPUTS = (
    "Tensor query_proj, Tensor memory_proj, Tensor? memory_exp, Tensor v, Tensor memory"
)

# Results of a forward operator that were not requested are None: a tensor takes 1 us to make, and
# a decoding step needs only the context. ``wanted`` has a bool for each input that may have a
# gradient, in order, then one for the centers; a backward operator returns None where it is False.
_OTHER_ROWS = ("memory_proj", "memory_exp")  # operands with one row per row of a ragged memory
LONGEST = 2**40  # maximum source length: fits in no memory, and overflows no index arithmetic
library = torch.library.Library("fused_attn", "DEF")
library.define(
    f"dot_attention(Tensor query, Tensor memory, {_POSITIONS}, {_WANTED}, "
    f"float scale=1.0, {_KEEP}, {_BACKEND}, {_WINDOW}, {_RAGGED}) -> {_OUTPUTS}"
)
library.define(
    f"dot_attention_backward({_GRAD_OUTPUTS}, Tensor query, Tensor memory, {_SAVED}, "
    f"bool[] wanted, {_POSITIONS}, float scale=1.0, {_KEEP}, {_BACKEND}, {_WINDOW}, {_RAGGED}) "
    "-> (Tensor? grad_query, Tensor? grad_memory, Tensor? grad_centers)"
)
library.define(
    f"concat_attention({_CONCAT_INPUTS}, {_POSITIONS}, {_WANTED}, {_KEEP}, {_BACKEND}, {_WINDOW}, "
    f"{_RAGGED}) -> {_OUTPUTS}"
)
library.define(
    f"concat_attention_backward({_GRAD_OUTPUTS}, {_CONCAT_INPUTS}, {_SAVED}, bool[] wanted, "
    f"{_POSITIONS}, {_KEEP}, {_BACKEND}, {_WINDOW}, {_RAGGED}) "
    "-> (Tensor? grad_query_proj, Tensor? grad_memory_proj, Tensor? grad_v, Tensor? grad_memory, "
    "Tensor? grad_centers)"
)
library.define(
    "concat_scores(Tensor query_proj, Tensor memory_proj, Tensor? memory_exp, Tensor v, "
    f"{_POSITIONS}, {_BACKEND}) -> Tensor"
)
library.define(
    "concat_scores_backward(Tensor grad_scores, Tensor query_proj, Tensor memory_proj, "
    f"Tensor? memory_exp, Tensor v, bool[] wanted, {_POSITIONS}, {_BACKEND}) "
    "-> (Tensor? grad_query_proj, Tensor? grad_memory_proj, Tensor? grad_v)"
)


def select(
    query: Tensor,
    memory: Tensor,
    score: str,
    backend: str,
    backward: bool = False,
    prepared: bool = False,
    windowed: bool = False,
) -> backends.Backend:
    if memory.is_cpu:  # the choice needs no sizes and no device name, which would take 0.6 us
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
    chosen: backends.Backend,
    query: Tensor,
    offsets: Tensor | None,
    longest: int,
    *tensors: Tensor | None,
) -> tuple[Any, ...]:
    """Lengths and ragged operands in the form that the backend takes: with offsets, or padded."""
    if offsets is None:
        raise ValueError("memory_lengths must be offsets (B + 1,) if max_source is given, got None")
    if not 0 <= longest <= LONGEST:
        raise ValueError(f"max_source must lie in 0..{LONGEST}, got {longest}")
    if getattr(chosen, "TAKES_OFFSETS", False):
        return (offsets, longest), *tensors
    operands.check_rows(query, offsets, _OTHER_ROWS[: len(tensors) - 1], *tensors)
    padded = (None if t is None else reference.pad_rows(t, offsets, longest) for t in tensors)
    return offsets.diff(), *padded


def _unpadded(grads: reference.Gradients, offsets: Any) -> reference.Gradients:
    """Convert gradients (B, S, width) of memory and projection to rows (N, width)."""
    query, *rest = grads
    return query, *(
        reference.unpad_rows(g, offsets) if g is not None and g.dim() == 3 else g for g in rest
    )


def dot_forward(
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
    chosen = select(query, memory, "dot", backend, windowed=centers is not None)
    if max_source is not None:
        memory_lengths, memory = _ragged(chosen, query, memory_lengths, max_source, memory)
    window = (centers, half_width, gaussian)
    masking = _masking(memory_lengths, memory_mask, keep_mask, keep_scale, *window)
    return chosen.dot_forward(query, memory, scale, masking, return_weights, return_logsumexp)


def dot_backward(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    grad_logsumexp: Tensor | None,
    query: Tensor,
    memory: Tensor,
    context: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor,
    wanted: list[bool],
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
    backend = "eager" if grad_logsumexp is not None else backend
    chosen = select(query, memory, "dot", backend, backward=True, windowed=windowed)
    lengths: Any = memory_lengths
    if max_source is not None:
        lengths, memory = _ragged(chosen, query, memory_lengths, max_source, memory)
    window = (centers, half_width, gaussian)
    masking = _masking(lengths, memory_mask, keep_mask, keep_scale, *window)
    saved = (context, weights, logsumexp)
    inputs: tuple[Any, ...] = (query, memory, scale, masking, saved, wanted)
    if grad_logsumexp is None:
        grads = chosen.dot_backward(grad_context, grad_weights, *inputs)
    else:
        grad_outputs = (grad_context, grad_weights, grad_logsumexp)
        grads = eager.dot_gradients(*grad_outputs, *inputs)
    return grads if max_source is None else _unpadded(grads, memory_lengths)


def concat_forward(
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
    chosen = select(query_proj, memory, "concat", backend, **kinds)
    if max_source is not None:
        rows = (memory_proj, memory_exp, memory)
        found = _ragged(chosen, query_proj, memory_lengths, max_source, *rows)
        memory_lengths, memory_proj, memory_exp, memory = found
    window = (centers, half_width, gaussian)
    masking = _masking(memory_lengths, memory_mask, keep_mask, keep_scale, *window)
    inputs = (query_proj, memory_proj, memory_exp, v, memory)
    return chosen.concat_forward(*inputs, masking, return_weights, return_logsumexp)


def concat_backward(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    grad_logsumexp: Tensor | None,
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    memory: Tensor,
    context: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor,
    wanted: list[bool],
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
    backend = "eager" if grad_logsumexp is not None else backend
    chosen = select(query_proj, memory, "concat", backend, backward=True, **kinds)
    lengths: Any = memory_lengths
    if max_source is not None:
        rows = (memory_proj, memory_exp, memory)
        found = _ragged(chosen, query_proj, memory_lengths, max_source, *rows)
        lengths, memory_proj, memory_exp, memory = found
    window = (centers, half_width, gaussian)
    masking = _masking(lengths, memory_mask, keep_mask, keep_scale, *window)
    saved = (context, weights, logsumexp)
    inputs: tuple[Any, ...] = (query_proj, memory_proj, memory_exp, v, memory)
    inputs = (*inputs, masking, saved, wanted)
    if grad_logsumexp is None:
        grads = chosen.concat_backward(grad_context, grad_weights, *inputs)
    else:
        grad_outputs = (grad_context, grad_weights, grad_logsumexp)
        grads = eager.concat_gradients(*grad_outputs, *inputs)
    return grads if max_source is None else _unpadded(grads, memory_lengths)


def concat_scores(
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    memory_lengths: Tensor | None = None,
    memory_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    chosen = select(query_proj, memory_proj, "scores", backend)
    masking = (memory_lengths, memory_mask, None, 1.0, None)
    return chosen.concat_scores(query_proj, memory_proj, memory_exp, v, masking)


def concat_scores_backward(
    grad_scores: Tensor,
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    wanted: list[bool],
    memory_lengths: Tensor | None = None,
    memory_mask: Tensor | None = None,
    backend: str = "auto",
) -> reference.Gradients:
    chosen = select(query_proj, memory_proj, "scores", backend, backward=True)
    masking = (memory_lengths, memory_mask, None, 1.0, None)
    inputs = (query_proj, memory_proj, memory_exp, v)
    return chosen.concat_scores_backward(grad_scores, *inputs, masking, wanted)


def register_derivative(name: str, derivative: Any, batched: Any) -> None:
    """Register what the dispatcher calls before an operator: its autograd and its vmap rule."""
    library.impl(name.removeprefix("fused_attn::"), derivative, "Autograd")
    torch.library.register_vmap(name, batched, lib=library)


for _name, _implementation in (
    ("dot_attention", dot_forward),
    ("dot_attention_backward", dot_backward),
    ("concat_attention", concat_forward),
    ("concat_attention_backward", concat_backward),
    ("concat_scores", concat_scores),
    ("concat_scores_backward", concat_scores_backward),
):
    library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_attn::{_name}", getattr(fakes, _name), lib=library)
    fakes.register_flops(_name, getattr(torch.ops.fused_attn, _name))
