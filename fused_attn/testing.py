"""Tools to test attention: input factories, a float64 oracle, a baseline and an error budget.

A result is correct if its largest error against the oracle is at most

    2 x (largest error of plain attention in the same dtype) + floor x (largest oracle value).

The oracle is `reference` in float64 on the quantised inputs, so that the rounding of the inputs is
not counted as an error. Plain attention is the usual handwritten code, in the dtype of the inputs.
The floor (see `FLOORS`) allows for cases in which plain attention rounds better by chance.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils import deterministic

from fused_attn import choices, functional, reference
from fused_attn.reference import LocalWindow, Masking

FLOORS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
DTYPES = tuple(FLOORS)
# "projected" is the concat score with given projections, as the operator takes it.
SCORES = (*choices.SCORES, "projected")
MASKS = ("none", "shared", "row", "cube")  # none, (B, S), (B, 1, S), (B, T, S)
WINDOWS = ("none", "hard", "gaussian")
LAYOUTS = ("contiguous", "transposed", "expanded", "sliced", "offset")

# Arguments without a batch dimension; their gradients are sums over the batch.
_PARAMETERS = ("weight", "query_weight", "memory_weight", "v", "bias")
_ORACLE_ELEMENTS = 1 << 24  # of (B, T, S, A) at a time, to limit the memory of the oracle
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """The description of one call. `make_inputs` draws its tensors; its str is a test id."""

    score: str  # one of SCORES
    dtype: torch.dtype = torch.float32
    batch: int = 3
    queries: int = 5
    source: int = 9
    query_dim: int = 16  # D; the dot score takes memory_dim instead
    memory_dim: int = 16  # E
    attn_dim: int = 16  # A
    lengths: bool = False  # the rows have lengths S, 0, and some between
    mask: str = "none"  # one of MASKS
    window: str = "none"  # one of WINDOWS
    keep: bool = False  # dropout on the weights
    bias: bool = False  # of the concat score
    layout: str = "contiguous"  # one of LAYOUTS, for every tensor
    weights: bool = True  # whether the weights are returned, and get a gradient

    def __str__(self) -> str:
        sizes = f"B{self.batch}T{self.queries}S{self.source}E{self.memory_dim}"
        if self.score in ("general", "concat"):
            sizes += f"D{self.query_dim}"
        if self.score in ("concat", "projected"):
            sizes += f"A{self.attn_dim}"
        flags = [name for name in ("lengths", "keep", "bias") if getattr(self, name)]
        flags += [] if self.weights else ["no_weights"]
        flags += [f"{self.mask}_mask"] if self.mask != "none" else []
        flags += [f"{self.window}_window"] if self.window != "none" else []
        flags += [self.layout] if self.layout != "contiguous" else []
        return "-".join([self.score, str(self.dtype).removeprefix("torch."), sizes, *flags])


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call, and the gradients of its results."""

    score: str
    tensors: Tensors  # the differentiable arguments
    masking: Masking
    scale: float
    grad_context: Tensor
    grad_weights: Tensor | None  # None: the weights are not requested


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """Return the same values with other strides; "expanded" repeats the first row."""
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "expanded" and tensor.dim() > 2:
        return tensor[:1].clone().expand(tensor.shape)
    if layout == "sliced":  # the gaps between the values hold NaN, or True in a mask
        gaps = torch.full((*tensor.shape, 2), torch.nan, device=tensor.device).to(tensor.dtype)
        gaps[..., 0] = tensor
        return gaps.flatten(-2)[..., ::2]
    if layout == "offset":  # aligned only to the element size
        flat = torch.cat((tensor.new_zeros(1), tensor.flatten()))
        return flat[1:].view(tensor.shape)
    return tensor.contiguous()


def _each(masking: Masking, change: Callable[[Tensor], Tensor]) -> Masking:
    """Apply ``change`` to the tensors of a masking."""
    lengths, mask, keep = (None if tensor is None else change(tensor) for tensor in masking[:3])
    window = masking.window
    if window is not None:
        window = window._replace(centers=change(window.centers))
    return Masking(lengths, mask, keep, masking.keep_scale, window)


def _differentiable(masking: Masking, tensors: Tensors) -> Masking:
    """The masking with its centers replaced by the differentiable ones, if there are any."""
    if masking.window is None or "centers" not in tensors:
        return masking
    return masking._replace(window=masking.window._replace(centers=tensors["centers"]))


def _masking(case: Case, draw: Callable[..., Tensor]) -> Masking:
    batch, queries, source = case.batch, case.queries, case.source
    lengths = mask = None
    if case.lengths:
        between = torch.arange(batch) * source // max(batch, 1)
        lengths = torch.cat((torch.tensor([source, 0]), between))[:batch]
    if case.mask != "none":  # allows three positions in four, and none for the very last query
        mask = draw(batch, queries if case.mask == "cube" else 1, source) > -0.67
        mask[-1:, -1:] = False
        mask = mask[:, 0] if case.mask == "shared" else mask
    keep = draw(batch, queries, source) > -0.5 if case.keep else None
    return Masking(lengths, mask, keep, 1.5 if case.keep else 1.0, _window(case, draw))


def _window(case: Case, draw: Callable[..., Tensor]) -> LocalWindow | None:
    """Windows of about a third of the source. Some are cut at its edges; the first is outside."""
    if case.window == "none":
        return None
    centers = draw(case.batch, case.queries, size=0.3 * case.source) + 0.5 * case.source
    if case.window == "hard":
        centers = centers.round()
    centers[:1, :1] = -2.0 * case.source
    half_width = max(1.0, case.source // 6) if case.window == "hard" else case.source / 6 + 0.4
    return LocalWindow(centers, half_width, case.window == "gaussian")


def make_inputs(case: Case, seed: int = 0, device: str = "cpu") -> Inputs:
    """Draw the inputs of ``case``. Scores have a spread of about 2, whatever the widths are."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, size: float = 1.0) -> Tensor:
        return size * torch.randn(*shape, dtype=torch.float64, generator=generator)

    batch, queries, source = case.batch, case.queries, case.source
    query_dim, memory_dim, attn_dim = case.query_dim, case.memory_dim, case.attn_dim
    tensors = {"memory": draw(batch, source, memory_dim)}
    if case.score == "dot":
        tensors["query"] = draw(batch, queries, memory_dim, size=2 * memory_dim**-0.5)
    elif case.score == "projected":
        tensors["query_proj"] = draw(batch, queries, attn_dim)
        tensors["memory_proj"] = draw(batch, source, attn_dim)
    else:
        tensors["query"] = draw(batch, queries, query_dim)
    if case.score == "general":
        tensors["weight"] = draw(query_dim, memory_dim, size=2 * (query_dim * memory_dim) ** -0.5)
    elif case.score == "concat":
        tensors["query_weight"] = draw(attn_dim, query_dim, size=query_dim**-0.5)
        tensors["memory_weight"] = draw(attn_dim, memory_dim, size=memory_dim**-0.5)
    if case.score in ("concat", "projected"):
        tensors["v"] = draw(attn_dim, size=2 * attn_dim**-0.5)
    if case.bias and case.score == "concat":
        tensors["bias"] = draw(attn_dim)
    masking = _masking(case, draw)
    if masking.window is not None:  # centers always have the dtype of the arithmetic
        centers = masking.window.centers.to(device, reference.arithmetic_dtype(case.dtype))
        masking = masking._replace(window=masking.window._replace(centers=centers))
    grad_outputs = [draw(batch, queries, memory_dim), draw(batch, queries, source)]

    def place(tensor: Tensor) -> Tensor:
        return lay_out(tensor.to(device, case.dtype), case.layout)

    placed = {name: place(tensor) for name, tensor in tensors.items()}
    if masking.window is not None and masking.window.gaussian:
        placed["centers"] = masking.window.centers
    return Inputs(
        score=case.score,
        tensors=placed,
        masking=_each(masking, lambda tensor: lay_out(tensor.to(device), case.layout)),
        scale=0.75 if case.score in ("dot", "general") else 1.0,
        grad_context=place(grad_outputs[0]),
        grad_weights=place(grad_outputs[1]) if case.weights else None,
    )


def _cubed(masking: Masking) -> Masking:
    """The masking with the mask as (B, 1 or T, S), as the reference takes it."""
    mask = masking.memory_mask
    return masking._replace(
        memory_mask=mask.unsqueeze(1) if mask is not None and mask.dim() == 2 else mask
    )


def counted(inputs: Inputs) -> Tensor:
    """Bool (B, 1 or T, S): the positions that each query may attend to."""
    return reference.counted_positions(inputs.tensors["memory"], _cubed(inputs.masking))


def spoil_padding(inputs: Inputs, value: float) -> Inputs:
    """Return the inputs with ``value`` (such as NaN) in every memory row masked for all queries."""
    padding = ~counted(inputs).any(dim=1)[..., None]
    spoiled = {
        name: tensor.masked_fill(padding, value)
        for name, tensor in inputs.tensors.items()
        if name in ("memory", "memory_proj")
    }
    return replace(inputs, tensors=inputs.tensors | spoiled)


def _projections(score: str, tensors: Tensors, masking: Masking) -> tuple[Tensor, Tensor]:
    """The (projected) query and the keys that it is scored against."""
    memory = tensors["memory"]
    if score == "dot":
        return tensors["query"], memory
    if score == "general":
        return tensors["query"] @ tensors["weight"], memory
    if score == "projected":
        return tensors["query_proj"], tensors["memory_proj"]
    readable = reference.zero_uncounted_rows(memory, masking)
    query_proj = linear(tensors["query"], tensors["query_weight"], tensors.get("bias"))
    return query_proj, linear(readable, tensors["memory_weight"])


def plain_attention(
    score: str, tensors: Tensors, scale: float, counts: Tensor | None, masking: Masking
) -> tuple[Tensor, Tensor]:
    """Handwritten attention: bmm, masked_fill, softmax, bmm. Returns (context, weights).

    ``counts`` (B, 1 or T, S) comes from `counted`. A query whose positions are all masked gets
    uniform weights here.
    """
    query, keys = _projections(score, tensors, Masking())
    if score in ("dot", "general"):
        scores = scale * torch.bmm(query, keys.transpose(1, 2))
    else:
        scores = torch.tanh(query[:, :, None] + keys[:, None]) @ tensors["v"]
    if counts is not None:
        scores = scores.masked_fill(~counts, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1)
    if masking.window is not None and masking.window.gaussian:
        centers, half_width, _ = masking.window
        positions = torch.arange(scores.shape[-1], device=scores.device)
        sigma = half_width / 2
        factor = torch.exp(-((positions - centers[..., None]) ** 2) / (2 * sigma**2))
        weights = weights * factor.to(weights.dtype)
    summed = weights
    if masking.keep_mask is not None:
        summed = weights * masking.keep_mask * masking.keep_scale
    return torch.bmm(summed, tensors["memory"]), weights


def evaluate(call: Callable[[Tensors], tuple[Tensor, Tensor | None]], inputs: Inputs) -> Tensors:
    """Run ``call`` on the inputs, forward and backward. Returns results and gradients by name."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.tensors.items()}
    context, weights = call(leaves)
    results = {"context": context.detach()}
    roots, grad_outputs = [context], [inputs.grad_context.to(context.dtype)]
    if weights is not None and inputs.grad_weights is not None:
        results["weights"] = weights.detach()
        roots.append(weights)
        grad_outputs.append(inputs.grad_weights.to(weights.dtype))
    grads = torch.autograd.grad(roots, list(leaves.values()), grad_outputs, materialize_grads=True)
    return results | {f"grad_{name}": g for name, g in zip(leaves, grads, strict=True)}


def fused(inputs: Inputs, backend: str = "auto") -> Tensors:
    """Run the code under test, through the public functions where they take all of the inputs."""
    masking, scale = inputs.masking, inputs.scale
    wanted = inputs.grad_weights is not None

    def call(tensors: Tensors) -> tuple[Tensor, Tensor | None]:
        if masking.keep_mask is None and inputs.score != "projected":
            lengths, mask = masking[:2]
            scaled = {} if inputs.score == "concat" else {"scale": scale}
            function = getattr(functional, f"{inputs.score}_attention")
            rest = {"return_weights": wanted, "backend": backend}
            rest["window"] = _differentiable(masking, tensors).window
            operands = {name: t for name, t in tensors.items() if name != "centers"}
            return function(**operands, **scaled, memory_lengths=lengths, memory_mask=mask, **rest)
        whole, memory = _differentiable(_cubed(masking), tensors), tensors["memory"]
        query, keys = _projections(inputs.score, tensors, whole)
        if inputs.score in ("dot", "general"):
            return functional.attend_dot(query, memory, scale, whole, wanted, backend)
        v = tensors["v"]
        return functional.attend_concat(query, keys, None, v, memory, whole, wanted, backend)

    return evaluate(call, inputs)


def plain(inputs: Inputs) -> Tensors:
    """The baseline: `plain_attention` in the dtype of the inputs, with masked results set to 0."""
    counts = counted(inputs)
    empty = ~counts.any(dim=-1, keepdim=True)
    masking = _cubed(inputs.masking)

    def call(tensors: Tensors) -> tuple[Tensor, Tensor]:
        local = _differentiable(masking, tensors)
        context, weights = plain_attention(inputs.score, tensors, inputs.scale, counts, local)
        return context.masked_fill(empty, 0), weights.masked_fill(~counts, 0)

    return evaluate(call, inputs)


def oracle(inputs: Inputs) -> Tensors:
    """The exact results: the reference in float64 on the same inputs, some batch rows at a time."""
    tensors = inputs.tensors
    batch, source, _ = tensors["memory"].shape
    queries = tensors["query" if "query" in tensors else "query_proj"].shape[1]
    width = tensors["v"].shape[0] if "v" in tensors else 1
    rows = max(1, _ORACLE_ELEMENTS // max(queries * source * width, 1))
    parts = [_oracle_rows(inputs, slice(at, at + rows)) for at in range(0, max(batch, 1), rows)]

    def join(name: str) -> Tensor:
        found = [part[name] for part in parts]
        is_sum = name.removeprefix("grad_") in _PARAMETERS
        return torch.stack(found).sum(dim=0) if is_sum else torch.cat(found)

    return {name: join(name) for name in parts[0]}


def _oracle_rows(inputs: Inputs, rows: slice) -> Tensors:
    masking = _each(_cubed(inputs.masking), lambda tensor: tensor[rows])
    score, scale = inputs.score, inputs.scale

    def call(tensors: Tensors) -> tuple[Tensor, Tensor]:
        query, keys = _projections(score, tensors, masking)
        local = _differentiable(masking, tensors)
        if score in ("dot", "general"):
            result = reference.dot_attention(query, tensors["memory"], scale, local)
        else:
            memory, v = tensors["memory"], tensors["v"]
            result = reference.concat_attention(query, keys, v, memory, local)
        return result.context, result.weights

    in_double = {
        name: tensor.double() if name in _PARAMETERS else tensor[rows].double()
        for name, tensor in inputs.tensors.items()
    }
    grad_weights = None if inputs.grad_weights is None else inputs.grad_weights[rows]
    part = Inputs(score, in_double, masking, scale, inputs.grad_context[rows], grad_weights)
    return evaluate(call, part)


@dataclass(frozen=True)
class Verdict:
    """The comparison of one result with the oracle. ``budget`` is the largest allowed error."""

    error: float
    yardstick: float  # the error of plain attention
    budget: float
    largest: float  # the largest absolute value of the oracle

    @property
    def passed(self) -> bool:
        return self.error <= self.budget  # False if either is NaN


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def judge(got: Tensor, oracle: Tensor, plain: Tensor, scale: float | None = None) -> Verdict:
    """Compare one result with the oracle. ``scale`` replaces the largest oracle value if given."""
    largest = _largest(oracle)
    yardstick = _largest(plain.double() - oracle)
    floor = FLOORS[got.dtype] * (largest if scale is None else scale)
    return Verdict(_largest(got.double() - oracle), yardstick, 2 * yardstick + floor, largest)


def check_within_budget(
    name: str, got: Tensor, oracle: Tensor, plain: Tensor, scale: float | None = None
) -> None:
    """Raise AssertionError, with place and size of the error, if ``got`` exceeds the budget."""
    if got.shape != oracle.shape or got.dtype != plain.dtype:
        expected, found = (plain.dtype, tuple(oracle.shape)), (got.dtype, tuple(got.shape))
        raise AssertionError(f"{name}: expected {expected}, got {found}")
    verdict = judge(got, oracle, plain, scale)
    if verdict.passed:
        return
    errors = (got.double() - oracle).abs().nan_to_num(torch.inf, torch.inf)
    where = tuple(int(i) for i in torch.unravel_index(errors.argmax(), errors.shape))
    raise AssertionError(
        f"{name}: error {verdict.error:.3g} exceeds the budget {verdict.budget:.3g} "
        f"(2 x {verdict.yardstick:.3g} of plain attention + {FLOORS[got.dtype]:g} x the largest "
        f"value {verdict.largest if scale is None else scale:.3g}); worst at {where}: "
        f"expected {float(oracle[where]):.9g}, got {float(got[where]):.9g}; "
        f"{int(got.isnan().sum())} of {got.numel()} are NaN"
    )


def check_results(
    got: Mapping[str, Tensor],
    oracle: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    scales: Mapping[str, float] | None = None,
) -> None:
    """`check_within_budget` for every result, with all failures in one message.

    ``scales`` holds, by name, values to use for the floor instead of the largest oracle value.
    """
    if got.keys() != oracle.keys():
        raise AssertionError(f"expected the results {[*oracle]}, got {[*got]}")
    failures = []
    for name, tensor in got.items():
        try:
            scale = scales.get(name) if scales else None
            check_within_budget(name, tensor, oracle[name], plain[name], scale)
        except AssertionError as failure:
            failures.append(str(failure))
    if failures:
        raise AssertionError("\n".join(failures))


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """A context in which torch.empty and the like return NaN, to reveal unwritten outputs."""
    settings: Any = deterministic
    filled = settings.fill_uninitialized_memory
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        # Only the filling is wanted here, not warnings about nondeterministic operators.
        warnings.filterwarnings("ignore", message=".*deterministic")
        try:
            torch.use_deterministic_algorithms(True, warn_only=True)
            settings.fill_uninitialized_memory = True
            yield
        finally:
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
            settings.fill_uninitialized_memory = filled
