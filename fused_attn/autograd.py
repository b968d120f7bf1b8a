"""The derivatives of the operators: what is saved, and which gradients are computed.

Derivatives are registered with the dispatcher under the operator's name, so that any graph which
holds the operator can be trained. The inputs, the context and the log-sum-exp are saved for
backward, and the weights if they were returned; otherwise backward recomputes the scores. Only the
gradients that are needed are computed. The backward operators have derivatives too, by composition
of ATen operators. Calls are composed in the same way under torch.func transforms, in forward-mode
AD, and in traces for ONNX or TorchScript.

A call on ordinary tensors, with no mode or compiler active, bypasses the dispatcher, which would
take longer than a small problem.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_attn import composites, ops
from fused_attn.backends import cpu
from fused_attn.checks import check_bounds
from fused_attn.reference import MaskingFields
from fused_attn.routes import DIRECT, OPERATOR, is_transformed, route

_WITH_LOGSUMEXP, _WITHOUT_LOGSUMEXP = True, False  # return_logsumexp, where it is positional

_below_autograd: Any = torch._C._AutoDispatchBelowAutograd
# Whether every argument is None or an ordinary tensor, whose pointer a backend can read. Without
# the native module there is no fast path, and the answer is always no.
_are_plain: Any = cpu.native.are_plain if cpu.native is not None else lambda *tensors: False


def _is_batched(grad: Tensor | None) -> bool:
    """Whether grad comes from ``is_grads_batched=True``, which is not a torch.func transform."""
    return grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad)


class Operator(NamedTuple):
    """A forward operator and its backward operator, with the functions that implement them."""

    forward: Any
    run: Callable[..., Any]
    compose: Callable[..., Any]
    backward: Any
    run_backward: Callable[..., Any]
    inputs: int  # the number of arguments before memory_lengths and memory_mask
    differentiable: tuple[int, ...]  # indices of the arguments that may have a gradient
    gradients: tuple[int, ...]  # their indices in the result of `_Differentiated.backward`
    tensors: tuple[int, ...]  # indices of the arguments that may be tensors
    options: tuple[int, int]  # indices of keep_mask and centers; past the end if there are none
    defaults: tuple[Any, ...]  # the default value of every argument

    def backward_composed(self, arguments: tuple[Any, ...], **named: Any) -> Any:
        """The backward pass composed of ATen operators: supports derivatives and transforms."""
        names = (argument.name for argument in self.backward._schema.arguments)
        given = dict(zip(names, arguments, strict=False)) | named
        return self.run_backward(**given | {"backend": "eager"})


def _operator(name: str, *functions: Any, differentiable: tuple[str, ...]) -> Operator:
    run, compose, run_backward = functions
    forward = getattr(torch.ops.fused_attn, name).default
    backward = getattr(torch.ops.fused_attn, f"{name}_backward").default
    arguments = forward._schema.arguments
    names = [argument.name for argument in arguments]
    places = tuple(names.index(name) for name in differentiable)
    tensors = tuple(i for i, argument in enumerate(arguments) if "Tensor" in str(argument.type))
    has_options = "keep_mask" in names
    return Operator(
        *(forward, run, compose, backward, run_backward),
        inputs=names.index("memory_lengths"),
        differentiable=places,
        gradients=tuple(2 + place for place in places),
        tensors=tensors,
        options=(names.index("keep_mask"), names.index("centers")) if has_options else (99, 99),
        defaults=tuple(argument.default_value for argument in arguments),
    )


DOT = _operator(
    "dot_attention",
    *(ops.dot_forward, composites.dot_attention, ops.dot_backward),
    differentiable=("query", "memory", "centers"),
)
CONCAT = _operator(
    "concat_attention",
    *(ops.concat_forward, composites.concat_attention, ops.concat_backward),
    differentiable=("query_proj", "memory_proj", "v", "memory", "centers"),
)
SCORES = _operator(
    "concat_scores",
    *(ops.concat_scores, composites.concat_scores, ops.concat_scores_backward),
    differentiable=("query_proj", "memory_proj", "v"),
)


class _Differentiated(torch.autograd.Function):
    """A call of an operator with inputs that require a gradient.

    ``direct`` allows calling the implementation itself, without the dispatcher.
    """

    @staticmethod
    def forward(ctx: Any, operator: Operator, direct: bool, *arguments: Any) -> Any:
        masks = operator.inputs
        lengths, mask = arguments[masks : masks + 2]
        # Clones, so that the caller may change lengths and mask before backward runs.
        lengths = lengths if lengths is None else lengths.clone()
        mask = mask if mask is None else mask.clone()
        rest = arguments[masks + 2 :]
        fields = [*arguments[:masks], lengths, mask]
        if operator is SCORES:
            result = _run(operator.forward, operator.run, direct, (*fields, *rest))
            outputs: tuple[Any, ...] = ()
        else:
            ctx.returns, rest = rest[:2], rest[2:]
            called = (*fields, ctx.returns[0], _WITH_LOGSUMEXP, *rest)  # for the backward
            outputs = _run(operator.forward, operator.run, direct, called)
            result = _returned(ctx, outputs)
        keep, centers = operator.options
        if len(arguments) > keep:
            outputs = (*outputs, arguments[keep], arguments[centers])
            # These two are saved as tensors. ``rest`` starts after the two return flags.
            kept = [*rest]
            kept[keep - masks - 4] = kept[centers - masks - 4] = None
            rest = tuple(kept)
        ctx.save_for_backward(*fields, *outputs)
        ctx.operator, ctx.direct, ctx.rest = operator, direct, rest
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        operator, rest, saved = ctx.operator, ctx.rest, ctx.saved_tensors
        needs = ctx.needs_input_grad
        count = len(needs)
        wanted = [i < count and needs[i] for i in operator.gradients]
        masks = operator.inputs
        after = masks + 2
        if operator is not SCORES:
            grads = _grad_outputs(ctx, grads)
            after += 3
        if len(saved) > after:
            keep, centers = operator.options
            rest = [*rest]
            rest[keep - masks - 4], rest[centers - masks - 4] = saved[after:]
        results: list[Any] = [None] * count
        if all(grad is None for grad in grads):
            return tuple(results)
        called = (
            *(*grads, *saved[:masks], *saved[masks + 2 : after], wanted),
            *(*saved[masks : masks + 2], *rest),
        )
        # With create_graph=True the gradients need derivatives, which only the operator has.
        direct = ctx.direct and not torch.is_grad_enabled() and route() == DIRECT
        direct = direct and _are_plain(*grads, *saved)  # a saved-tensor hook may return any tensor
        if not direct and (is_transformed() or any(map(_is_batched, grads))):
            found = operator.backward_composed(called)  # the graph was built before the transform
        else:
            found = _run(operator.backward, operator.run_backward, direct, called)
        for i, grad in zip(operator.gradients, found, strict=True):
            if grad is not None:
                results[i] = grad
        return tuple(results)


def _returned(ctx: Any, outputs: tuple[Any, ...]) -> Any:
    """Those of context, weights and log-sum-exp that were requested."""
    context, weights, logsumexp = outputs
    returns_weights, returns_logsumexp = ctx.returns
    if not returns_weights and not returns_logsumexp:
        return context
    ctx.set_materialize_grads(False)  # some results may get no gradient
    if not returns_logsumexp:
        return context, weights
    return (context, weights, logsumexp) if returns_weights else (context, logsumexp)


def _grad_outputs(ctx: Any, grads: tuple[Any, ...]) -> tuple[Any, ...]:
    """The gradients of context, weights and log-sum-exp."""
    returns_weights, returns_logsumexp = ctx.returns
    grad_logsumexp = grads[-1] if returns_logsumexp else None
    return grads[0], grads[1] if returns_weights else None, grad_logsumexp


def _run(operator: Any, run: Callable[..., Any], direct: bool, arguments: Any) -> Any:
    if direct:
        return run(*arguments)
    if torch.is_grad_enabled():  # a backward pass that is differentiated itself
        return operator(*arguments)
    with _below_autograd():
        return operator(*arguments)


def _needs_grad(operator: Operator, arguments: tuple[Any, ...]) -> bool:
    if not torch.is_grad_enabled():
        return False
    count = len(arguments)
    for i in operator.differentiable:
        if i < count and arguments[i] is not None and arguments[i].requires_grad:
            return True
    return False


def _differentiated(operator: Operator, direct: bool, arguments: tuple[Any, ...]) -> Any:
    """Run `_Differentiated` and return its results in the form of the operator's."""
    found = _Differentiated.apply(operator, direct, *arguments)
    if operator is SCORES:
        return found
    returns_weights, returns_logsumexp = arguments[operator.inputs + 2 : operator.inputs + 4]
    if not returns_weights and not returns_logsumexp:
        return found, None, None
    return (
        found[0],
        found[1] if returns_weights else None,
        found[-1] if returns_logsumexp else None,
    )


def call(operator: Operator, tensors: tuple[Tensor | None, ...], *arguments: Any) -> Any:
    """Call an operator on checked arguments, in the cheapest way that `route` allows.

    ``arguments`` follow the operator's schema; trailing ones may be left out. ``tensors`` are all
    tensors among them.
    """
    how = route()
    if how == DIRECT and not _are_plain(*tensors):
        how = OPERATOR
    return _called(operator, how, arguments)


def _called(operator: Operator, how: int, arguments: tuple[Any, ...]) -> Any:
    if how == DIRECT:
        if _needs_grad(operator, arguments):
            return _differentiated(operator, direct=True, arguments=arguments)
        return operator.run(*arguments)
    if how == OPERATOR:
        return operator.forward(*arguments)
    check_bounds(arguments[operator.inputs], arguments[1])  # otherwise done by the backend
    return operator.compose(*arguments)


def _options(masking: MaskingFields, backend: str) -> tuple[Any, ...]:
    """The last arguments of an operator; empty if all of them have the schema's defaults."""
    _, _, keep, keep_scale, window = masking
    if window is None and keep is None and backend == "auto":
        return ()
    return (keep, keep_scale, backend, *(window or (None, 0.0, False)))


def dot_attention(
    query: Tensor,
    memory: Tensor,
    scale: float,
    masking: MaskingFields,
    return_weights: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """Dot attention on checked arguments. Returns (context, weights or None)."""
    lengths, mask, keep, _, window = masking
    centers = None if window is None else window[0]
    how = route()
    if how == DIRECT and _are_plain(query, memory, lengths, mask, keep, centers):
        if not torch.is_grad_enabled() or not (
            query.requires_grad
            or memory.requires_grad
            or (centers is not None and centers.requires_grad)
        ):  # decoding steps are short: nothing else runs between here and the backend
            chosen = ops.select(query, memory, "dot", backend, windowed=window is not None)
            outputs = chosen.dot_forward(
                query, memory, scale, masking, return_weights, _WITHOUT_LOGSUMEXP
            )
            return outputs[0], outputs[1]
    elif how == DIRECT:
        how = OPERATOR
    arguments = (query, memory, lengths, mask, return_weights, _WITHOUT_LOGSUMEXP, scale)
    outputs = _called(DOT, how, arguments + _options(masking, backend))
    return outputs[0], outputs[1]


def concat_attention(
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    memory: Tensor,
    masking: MaskingFields,
    return_weights: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """Concat attention on checked projections. Returns (context, weights or None).

    ``memory_exp`` (B, S, A) may hold the `exponentials` of ``memory_proj``; it gets no gradient.
    """
    lengths, mask, keep, _, window = masking
    inputs = (query_proj, memory_proj, memory_exp, v, memory)
    centers = None if window is None else window[0]
    how = route()
    if how == DIRECT and not _are_plain(*inputs, lengths, mask, keep, centers):
        how = OPERATOR
    arguments = (*inputs, lengths, mask, return_weights, _WITHOUT_LOGSUMEXP)
    outputs = _called(CONCAT, how, arguments + _options(masking, backend))
    return outputs[0], outputs[1]


def concat_scores(
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    memory_lengths: Tensor | None,
    memory_mask: Tensor | None,
    backend: str,
) -> Tensor:
    """Concat scores of checked projections: (B, T, S) in the dtype of the arithmetic.

    Masked positions are -inf.
    """
    inputs = (query_proj, memory_proj, memory_exp, v, memory_lengths, memory_mask)
    result: Tensor = call(SCORES, inputs, *inputs, backend)
    return result


def _batched(operator: Any, info: Any, in_dims: Any, *arguments: Any) -> Any:
    """The vmap rule of an operator that is called by name: one call per example."""
    found = []
    for index in range(info.batch_size):
        given = (
            argument if dim is None else argument.select(dim, index)
            for argument, dim in zip(arguments, in_dims, strict=True)
        )
        results = operator(*given)
        found.append(results if isinstance(results, tuple) else (results,))
    stacked = tuple(
        None if each[0] is None else torch.stack(each) for each in zip(*found, strict=True)
    )
    out_dims = tuple(None if each is None else 0 for each in stacked)
    return (stacked, out_dims) if len(stacked) > 1 else (stacked[0], 0)


def _register(operator: Operator) -> None:
    """Register the derivatives of the operator and of its backward with the dispatcher."""
    names = [argument.name for argument in operator.forward._schema.arguments]

    def forward(*given: Any, **named: Any) -> Any:
        arguments = (*given, *operator.defaults[len(given) :])
        if named:
            arguments = tuple(named.get(n, a) for n, a in zip(names, arguments, strict=True))
        if is_transformed():
            return operator.compose(*arguments)
        if _needs_grad(operator, arguments):
            return _differentiated(operator, direct=False, arguments=arguments)
        if route() == DIRECT and _are_plain(*(arguments[i] for i in operator.tensors)):
            return operator.run(*arguments)
        with _below_autograd():
            return operator.forward(*arguments)

    def backward(*given: Any, **named: Any) -> Any:
        tensors = (a for a in (*given, *named.values()) if isinstance(a, Tensor))
        if is_transformed() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
            return operator.backward_composed(given, **named)
        with _below_autograd():
            return operator.backward(*given, **named)

    for each, derivative in ((operator.forward, forward), (operator.backward, backward)):
        ops.register_derivative(each._schema.name, derivative, partial(_batched, each))


for _each in (DOT, CONCAT, SCORES):
    _register(_each)
