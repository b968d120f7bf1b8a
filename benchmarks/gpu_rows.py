"""What is measured on a GPU: shapes, scores and dtypes, the most telling first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fused_attn import functional, testing
from fused_attn.prepared import exponentials
from fused_attn.problem import AttentionProblem
from fused_attn.reference import Masking
from fused_attn.testing import Inputs

Tensors = dict[str, Tensor]


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
    with_compilers: bool = False  # torch.compile and flex_attention, which take long to start

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.").replace("float", "f")
        sizes = f"({self.batch},{self.queries},{self.source},{self.width})"
        passes = "fwd+bwd" if self.backward else "fwd"
        return f"{self.score} {dtype} {sizes} {passes}{'' if self.cold else ' hot'}"

    def problem(self) -> AttentionProblem:
        sizes = (self.batch, self.queries, self.source, self.width, self.width)
        return AttentionProblem(self.score, *sizes, self.dtype, "cuda", prepared=self.is_prepared)

    @property
    def is_prepared(self) -> bool:
        return self.score == "concat" and self.queries == 1


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
    compiled = (found[0], found[5], found[10], found[15])
    return [replace(row, with_compilers=row in compiled) for row in found]


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
    score = "projected" if row.score == "concat" else row.score
    return Inputs(score, tensors, Masking(), 1.0, seed_gradient, None)


def ours(row: Row, backend: str) -> Callable[[Tensors], Tensor]:
    """The context by a backend of ours."""
    if row.score != "concat":
        function = getattr(functional, f"{row.score}_attention")
        return lambda tensors: function(**tensors, backend=backend)[0]

    def attend(tensors: Tensors) -> Tensor:
        query, keys, v = (tensors[name] for name in ("query_proj", "memory_proj", "v"))
        exps = tensors.get("memory_exp")  # prepared
        rest = (exps, v, tensors["memory"], Masking(), False, backend)
        return functional.attend_concat(query, keys, *rest)[0]

    return attend


def eager(row: Row) -> Callable[[Tensors], Tensor]:
    """What people write: bmm, softmax, bmm."""
    score = "projected" if row.score == "concat" else row.score

    def attend(tensors: Tensors) -> Tensor:
        return testing.plain_attention(score, tensors, 1.0, None, Masking())[0]

    return attend


def prepared(row: Row, tensors: Tensors) -> Tensors:
    """With what a decoder keeps between its steps."""
    if not row.is_prepared:
        return tensors
    return tensors | {"memory_exp": exponentials(tensors["memory_proj"])}


def peers(row: Row) -> dict[str, Callable[[Tensors], Tensor]]:
    """Everything else that computes this score, by name."""
    found: dict[str, Any] = {"eager": eager(row)}
    if row.with_compilers:
        found["compile"] = torch.compile(eager(row), dynamic=False)
    if row.score != "dot":
        return found

    def heads(tensors: Tensors) -> tuple[Tensor, Tensor]:
        return tensors["query"][:, None], tensors["memory"][:, None]

    def sdpa(tensors: Tensors) -> Tensor:
        query, memory = heads(tensors)
        result = torch.nn.functional.scaled_dot_product_attention(query, memory, memory, scale=1.0)
        return result[:, 0]

    found["sdpa"] = sdpa
    if row.with_compilers:
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(flex_attention, dynamic=False)

        def flex(tensors: Tensors) -> Tensor:
            query, memory = heads(tensors)
            return compiled(query, memory, memory, scale=1.0)[:, 0]

        found["flex"] = flex
    return found
