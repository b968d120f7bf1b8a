"""Calls with sizes of 0 or 1 or with everything masked, and their correct results.

The correct results are computed independently of the package, in float64 and plain torch. A query
with nothing to attend to (everything masked, or a memory without rows) has context 0, weights 0 and
log-sum-exp -inf, and gives zero gradients.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
from torch import Tensor, nn

from fused_attn import testing

SIZES = (0, 1, 3)
BATCHES = tuple(product(SIZES, SIZES, SIZES))  # (B, T, S)
LENGTHS = ("none", "zeros", "full", "mixed")
MASKINGS = tuple(product(LENGTHS, testing.MASKS))
Tensors = dict[str, Tensor]


def draw(name: str, *shape: int) -> Tensor:
    """Float64 numbers that are exact in every dtype, the same for the same name and shape."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}{shape}".encode()))
    return torch.randint(-6, 7, shape, generator=generator).double() / 4


def lengths_of(kind: str, batch: int, source: int) -> Tensor | None:
    """None, or int64 (B,): all 0, all S, or alternating 0 and S."""
    every = {"zeros": 0, "full": source}
    if kind == "none":
        return None
    return torch.full((batch,), every[kind]) if kind in every else torch.arange(batch) % 2 * source


def mask_of(kind: str, batch: int, queries: int, source: int) -> Tensor | None:
    """None, or bool (B, S), (B, 1, S) or (B, T, S); the very last query is fully masked."""
    if kind == "none":
        return None
    mask = draw("mask", batch, queries if kind == "cube" else 1, source) > -0.6
    mask[-1:, -1:] = False
    return mask[:, 0] if kind == "shared" else mask


def counted(
    shape: tuple[int, int, int],
    lengths: Tensor | None,
    mask: Tensor | None,
    centers: Tensor | None = None,
    half_width: float = 0.0,
) -> Tensor:
    """bool (B, T, S): the positions that each query may attend to."""
    counts = torch.ones(shape, dtype=torch.bool)
    positions = torch.arange(shape[2])
    if lengths is not None:
        counts = counts & (positions < lengths[:, None, None])
    if mask is not None:
        counts = counts & (mask if mask.dim() == 3 else mask[:, None])
    if centers is not None:
        counts = counts & ((positions - centers.detach()[..., None]).abs() <= half_width)
    return counts


def clean(rows: Tensor, counts: Tensor) -> Tensor:
    """Rows (B, S, X) with 0 where all queries are masked."""
    return rows.masked_fill(~counts.any(dim=1)[..., None], 0.0)


def spoil(rows: Tensor, counts: Tensor) -> Tensor:
    """Rows with NaN where all queries are masked, which may not be read; unchanged if T = 0."""
    unread = ~counts.any(dim=1) if counts.shape[1] else counts.any(dim=1)
    return rows.masked_fill(unread[..., None], torch.nan)


def softmax(scores: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (B, T, S) and log-sum-exp (B, T). The scores are too small to overflow."""
    shares = torch.exp(scores).masked_fill(~counts, 0.0)
    total = shares.sum(dim=-1)
    is_empty = total == 0.0
    total = total.masked_fill(is_empty, 1.0)
    return shares / total[..., None], total.log().masked_fill(is_empty, -torch.inf)


def sparsemax(scores: Tensor, counts: Tensor) -> Tensor:
    """Martins & Astudillo 2016, algorithm 1, row by row."""
    rows = []
    for row, counted_here in zip(scores.flatten(0, 1), counts.flatten(0, 1), strict=True):
        seen = row[counted_here]
        ranked = seen.sort(descending=True).values
        sizes = [k for k in range(1, len(ranked) + 1) if 1 + k * ranked[k - 1] > ranked[:k].sum()]
        weights = torch.zeros_like(row)
        if sizes:
            threshold = (ranked[: sizes[-1]].sum() - 1) / sizes[-1]
            weights = weights.masked_scatter(counted_here, (seen - threshold).clamp(min=0.0))
        rows.append(weights)
    return torch.stack(rows).view(scores.shape) if rows else torch.zeros_like(scores) * scores


def gaussian(centers: Tensor, half_width: float, source: int) -> Tensor:
    """exp(-(s - p)^2 / (2 sigma^2)) with sigma = half_width / 2: (B, T, S)."""
    distance = torch.arange(source) - centers[..., None]
    return torch.exp(-(distance**2) / (2 * (half_width / 2) ** 2))


def additive(query: Tensor, keys: Tensor, v: Tensor) -> Tensor:
    """v . tanh(q_t + k_s) of (B, T, A) and (B, S, A): (B, T, S)."""
    return (torch.tanh(query[:, :, None] + keys[:, None]) * v).sum(dim=-1)


def convolve(rows: Tensor, kernel: Tensor) -> Tensor:
    """Convolve zero-padded rows (..., S) with (channels, odd width). Returns (..., S, channels)."""
    width, source = kernel.shape[1], rows.shape[-1]
    wide = nn.functional.pad(rows, (width // 2, width // 2))
    seen = [wide[..., s : s + width] @ kernel.mT for s in range(source)]
    return torch.stack(seen, dim=-2) if seen else rows[..., None] * kernel[:, 0]


@dataclass(frozen=True)
class Call:
    """A call of the operators: dot, or concat with given projections."""

    score: str
    batch: int
    queries: int
    source: int
    width: int  # E
    score_width: int  # A, or E
    lengths: str = "none"
    mask: str = "none"
    window: str = "none"
    keep: bool = False
    seeds: tuple[str, ...] = ("context", "weights")  # results that get a gradient

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.batch, self.queries, self.source)

    @property
    def half_width(self) -> float:
        return 1.5 if self.window == "gaussian" else 1.0

    @property
    def masks(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Lengths, mask, keep mask of dropout, and centers of windows."""
        lengths = lengths_of(self.lengths, self.batch, self.source)
        mask = mask_of(self.mask, *self.shape)
        keep = draw("keep", *self.shape) > -0.5 if self.keep else None
        centers = draw("centers", self.batch, self.queries) + 1.0
        return lengths, mask, keep, None if self.window == "none" else centers

    @property
    def counts(self) -> Tensor:
        lengths, mask, _, centers = self.masks
        return counted(self.shape, lengths, mask, centers, self.half_width)

    def tensors(self) -> Tensors:
        """The differentiable arguments, including the centers of a Gaussian window."""
        batch, queries, source = self.shape
        tensors = {
            "query": draw("query", batch, queries, self.score_width),
            "memory": draw("memory", batch, source, self.width),
        }
        if self.score == "concat":
            tensors["memory_proj"] = draw("proj", batch, source, self.score_width)
            tensors["v"] = draw("v", self.score_width)
        if self.window == "gaussian":
            tensors["centers"] = draw("centers", batch, queries) + 1.0
        return tensors

    def seeds_of(self) -> Tensors:
        shapes = {
            "context": (self.batch, self.queries, self.width),
            "weights": self.shape,
            "scores": self.shape,
        }
        return {name: draw(f"grad {name}", *shapes[name]) for name in self.seeds}


SCALE, KEEP_SCALE = 0.5, 1.5


@cache
def right(call: Call) -> Tensors:
    """The correct results and gradients, by name."""
    leaves = {name: tensor.requires_grad_() for name, tensor in call.tensors().items()}
    counts, keep = call.counts, call.masks[2]
    memory = clean(leaves["memory"], counts)
    if call.score == "dot":
        scores = SCALE * (leaves["query"] @ memory.mT)
    else:
        scores = additive(leaves["query"], clean(leaves["memory_proj"], counts), leaves["v"])
    weights, log = softmax(scores, counts)
    if "centers" in leaves:
        weights = weights * gaussian(leaves["centers"], call.half_width, call.source)
    context = (weights if keep is None else weights * keep * KEEP_SCALE) @ memory
    results = {"context": context, "weights": weights, "logsumexp": log}
    results["scores"] = scores.masked_fill(~counts, -torch.inf)
    return results | gradients(results, leaves, call.seeds_of())


def gradients(results: Tensors, leaves: Tensors, seeds: Tensors) -> Tensors:
    """Gradients of the leaves, by name; zeros for leaves that no result depends on."""
    pairs = [(results[name], seed) for name, seed in seeds.items() if results[name].requires_grad]
    if not pairs:
        return {f"grad_{name}": torch.zeros_like(leaf) for name, leaf in leaves.items()}
    roots, given = [root for root, _ in pairs], [seed.to(root) for root, seed in pairs]
    found = torch.autograd.grad(roots, list(leaves.values()), given, materialize_grads=True)
    return {f"grad_{name}": grad for name, grad in zip(leaves, found, strict=True)}


def compare(
    got: Tensors, expected: Tensors, about: object, dtype: torch.dtype | None = None
) -> None:
    """Compare results with the correct ones, within the error budget of ``dtype`` or of their own.

    Where a weight is 1, gradients are differences of equal numbers. Therefore the scale of the
    budget is the size of the numbers here, 8, and not the size of a result.
    """
    for name, tensor in got.items():
        oracle = expected[name].detach()
        if tensor.shape != oracle.shape:
            raise AssertionError(f"{about}: {name} is {[*tensor.shape]}, not {[*oracle.shape]}")
        if tensor.numel() == 0:
            continue
        found = tensor.detach().cpu()
        infinite = oracle.isinf()
        if infinite.any():  # log-sum-exps and scores that are masked
            if not torch.equal(found[infinite].double(), oracle[infinite]):
                raise AssertionError(f"{about}: {name} must be -inf at {infinite}, got {found}")
            found, oracle = found.masked_fill(infinite, 0.0), oracle.masked_fill(infinite, 0.0)
        found = found if dtype is None else found.to(dtype)
        label = f"{about}: {name}"
        testing.check_within_budget(label, found, oracle, oracle.to(found.dtype), scale=8.0)


def padded(rows: Tensor, lengths: Sequence[int], source: int) -> Tensor:
    """Ragged rows (N, X) as (B, S, X), padded with 0."""
    if not lengths:
        return rows.sum() * rows.new_zeros(0, source, rows.shape[1])
    parts = rows.split(list(lengths))
    return torch.stack([nn.functional.pad(part, (0, 0, 0, source - len(part))) for part in parts])


def some_masks(
    rng: random.Random, number: int
) -> Iterator[tuple[tuple[int, ...], tuple[str, str]]]:
    """Every (B, T, S), each with ``number`` random kinds of (lengths, mask)."""
    for shape in BATCHES:
        yield from ((shape, masks) for masks in rng.sample(MASKINGS, number))


def operator_calls(score: str) -> Iterator[Call]:
    """Every combination of sizes, lengths and masks, some with windows and dropout.

    The rest is random: widths, which results get a gradient, and whether 3 queries become 9 (more
    than 8 take another code path). Calls without a size of 0 always have some lengths of 0.
    """
    rng = random.Random(0)
    wanted = (("context", "weights"), ("context",), ("weights",))
    extras = product(
        (("none", "none"), ("zeros", "shared"), ("mixed", "cube")),
        (("hard", False), ("gaussian", False), ("none", True)),
    )
    options = [(masks, ("none", False)) for masks in MASKINGS] + list(extras)
    for (batch, queries, source), ((lengths, mask), (window, keep)) in product(BATCHES, options):
        if batch and queries and source and lengths in ("none", "full"):
            continue
        queries = rng.choice((3, 9)) if queries == 3 else queries
        width = rng.choice((1, 19))
        score_width = width if score == "dot" else rng.choice((1, 5))
        rest = (lengths, mask, window, keep, rng.choice(wanted))
        yield Call(score, batch, queries, source, width, score_width, *rest)
