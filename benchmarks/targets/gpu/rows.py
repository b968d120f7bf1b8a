"""What is measured on a GPU: shapes, scores and dtypes, the most telling first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_attn import functional, testing
from fused_attn.prepared import exponentials
from fused_attn.problem import AttentionProblem
from fused_attn.reference import LocalWindow, Masking
from fused_attn.testing import Inputs

Tensors = dict[str, Tensor]
Results = tuple[Tensor, Tensor | None]  # context, and weights if they are asked for
Attend = Callable[[Tensors], Results]
COMPILERS = ("compile", "flex")  # rivals that take long to start


@dataclass(frozen=True)
class Row:
    """One call. D = E = A. ``cold`` inputs are read from memory, others may lie in the L2 cache."""

    score: str  # "dot", "general", "concat" (projected, as the operator takes it)
    batch: int
    queries: int
    source: int
    width: int
    dtype: torch.dtype = torch.bfloat16
    backward: bool = False  # measured as forward and backward together
    cold: bool = True
    backends: tuple[str, ...] = ("triton",)
    with_compilers: bool = False  # also against torch.compile and flex_attention
    lengths: bool = False  # of rows, drawn evenly from 1..S
    weights: bool = False  # they are returned
    half_width: int = 0  # of a hard window of local attention, if not 0

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.").replace("float", "f")
        sizes = f"({self.batch},{self.queries},{self.source},{self.width})"
        passes = "fwd+bwd" if self.backward else "fwd"
        words = [self.score, dtype, sizes, passes, "" if self.cold else "hot"]
        words += [name for name in ("lengths", "weights") if getattr(self, name)]
        words += [f"window {self.half_width}"] if self.half_width else []
        return " ".join(filter(None, words))

    def problem(self) -> AttentionProblem:
        sizes = (self.batch, self.queries, self.source, self.width, self.width)
        flags = {"prepared": self.is_prepared, "return_weights": self.weights}
        return AttentionProblem(
            self.score, *sizes, self.dtype, "cuda", windowed=self.half_width > 0, **flags
        )

    @property
    def is_prepared(self) -> bool:
        return self.score == "concat" and self.queries <= 8

    @property
    def read(self) -> float:
        """About the share of the memory that a call must read."""
        if self.half_width:
            return min(1.0, self.queries * (2 * self.half_width + 1) / self.source)
        return (self.source + 1) / (2 * self.source) if self.lengths else 1.0

    def sides(self) -> list[str]:
        """Who computes it: backends of ours, then the rivals, those that compile last."""
        found = [*self.backends, "eager"]
        if self.score == "dot" and not self.weights:
            found.append("sdpa")
        if self.with_compilers:
            found += [name for name in COMPILERS if name == "compile" or "sdpa" in found]
        return found


def rows() -> list[Row]:
    both, bf16, f32, f16 = ("triton", "cuda"), torch.bfloat16, torch.float32, torch.float16
    decode = [(64, 1024, 512), (32, 512, 512), (64, 1024, 1024), (128, 8192, 512), (8, 200, 512)]
    training = [(64, 64, 1024, 512), (64, 64, 1024, 1024), (64, 50, 50, 512),
                (128, 10, 128, 1024), (64, 64, 512, 512)]  # fmt: skip
    found = [Row("dot", b, 1, s, d, backends=both) for b, s, d in decode]
    for backward in (False, True):
        found += [Row("dot", *sizes, backward=backward) for sizes in training]
    found += [Row("concat", *training[0], backward=backward) for backward in (False, True)]
    found += [Row("concat", b, 1, s, d, backends=both) for b, s, d in decode]
    found += [Row("dot", b, 1, s, d, cold=False, backends=both) for b, s, d in decode]
    for backward in (False, True):
        found += [Row("concat", *sizes, backward=backward) for sizes in training[1:]]
        found += [Row("general", *sizes, backward=backward) for sizes in training]
        found += [Row("dot", *training[0], dtype, backward=backward) for dtype in (f32, f16)]
    found += [Row("concat", 1280, 1, 66, 1024, bf16, backends=both)]
    found += [Row("concat", 64, 1, 1024, 512, cold=False, backends=both)]
    found += _more(both)
    compiled = (found[0], found[5], found[10], found[15])
    return [replace(row, with_compilers=row in compiled) for row in found]


def _more(both: tuple[str, ...]) -> list[Row]:
    """Beams, lengths, weights and windows."""
    found = []
    for width in (512, 1024):
        found += [Row("dot", 64, queries, 1024, width, backends=both) for queries in (2, 4, 5, 8)]
        found += [Row("concat", 64, 5, 1024, width, backends=both)]
    for sizes in ((64, 1, 1024, 512), (64, 64, 1024, 512)):
        backends = both if sizes[1] == 1 else ("triton",)
        for score in ("dot", "concat"):
            found.append(Row(score, *sizes, backends=backends, lengths=True))
            found.append(Row(score, *sizes, backends=backends, weights=True))
            if sizes[1] > 1:
                found.append(Row(score, *sizes, backward=True, lengths=True))
    found += [
        Row("dot", 64, 1, 1024, 512, half_width=32),
        Row("dot", 64, 64, 1024, 512, half_width=32),
    ]
    found += [Row("dot", 64, 64, 1024, 512, half_width=32, backward=True)]
    return [*found, Row("dot", 32, 40, 200, 512), Row("dot", 16, 30, 300, 1000)]


def inputs_of(row: Row, device: str, seed: int = 0) -> Inputs:
    """Random inputs on the device: scores of a spread of about 2, whatever the width."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, size: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        return (size * values).to(row.dtype)

    batch, queries, source, width = row.batch, row.queries, row.source, row.width
    tensors = {"memory": draw(batch, source, width)}
    if row.score == "concat":
        tensors["query_proj"] = draw(batch, queries, width)
        tensors["memory_proj"] = draw(batch, source, width)
        tensors["v"] = draw(width, size=2 * width**-0.5)
    else:
        tensors["query"] = draw(batch, queries, width, size=2 * width**-0.5)
    if row.score == "general":
        tensors["query"] = draw(batch, queries, width)
        tensors["weight"] = draw(width, width, size=2 / width)
    seed_gradient = draw(batch, queries, width)
    weights_gradient = draw(batch, queries, source) if row.weights else None
    lengths, window = None, None
    if row.lengths:
        lengths = torch.randint(1, source + 1, (batch,), generator=generator, device=device)
    if row.half_width:
        centers = torch.rand(batch, queries, generator=generator, device=device) * source
        window = LocalWindow(centers.round(), float(row.half_width), False)
    score = "projected" if row.score == "concat" else row.score
    masking = Masking(lengths, None, None, 1.0, window)
    return Inputs(score, tensors, masking, 1.0, seed_gradient, weights_gradient)


def ours(row: Row, backend: str, masking: Masking) -> Attend:
    """The operators of a backend of ours."""
    if row.score != "concat":
        function = getattr(functional, f"{row.score}_attention")
        rest: dict[str, Any] = {"memory_lengths": masking.memory_lengths, "window": masking.window}
        rest |= {"return_weights": row.weights, "backend": backend}
        return lambda tensors: function(**tensors, **rest)

    def attend(tensors: Tensors) -> Results:
        query, keys, v = (tensors[name] for name in ("query_proj", "memory_proj", "v"))
        exps = tensors.get("memory_exp")  # prepared
        rest = (exps, v, tensors["memory"], masking, row.weights, backend)
        return functional.attend_concat(query, keys, *rest)

    return attend


def eager(row: Row, counts: Tensor | None) -> Attend:
    """What people write: bmm, softmax, bmm."""
    score = "projected" if row.score == "concat" else row.score

    def attend(tensors: Tensors) -> Results:
        context, weights = testing.plain_attention(score, tensors, 1.0, counts, Masking())
        return context, weights if row.weights else None

    return attend


def prepared(row: Row, tensors: Tensors) -> Tensors:
    """With what a decoder keeps between its steps."""
    if not row.is_prepared:
        return tensors
    return tensors | {"memory_exp": exponentials(tensors["memory_proj"])}


def side(row: Row, name: str, inputs: Inputs) -> Attend:
    """One of `Row.sides`: a backend of ours, or what else computes this score."""
    if name in row.backends:
        return ours(row, name, inputs.masking)
    # A mask is made once for a batch, and is no part of the call.
    counts = testing.counted(inputs) if row.lengths or row.half_width else None
    if name == "eager":
        return eager(row, counts)
    if name == "compile":
        return torch.compile(eager(row, counts), dynamic=False)
    if name == "sdpa":
        return _heads(
            partial(
                torch.nn.functional.scaled_dot_product_attention,
                attn_mask=(None if counts is None else counts[:, None]),
            )
        )
    from torch.nn.attention.flex_attention import flex_attention

    return _heads(torch.compile(flex_attention, dynamic=False))


def _heads(function: Callable[..., Any]) -> Attend:
    """An attention of torch with one head, whose keys and values are the memory."""

    def attend(tensors: Tensors) -> Results:
        query, memory = tensors["query"][:, None], tensors["memory"][:, None]
        return function(query, memory, memory, scale=1.0)[:, 0], None

    return attend
