"""Named problems: the shapes that are measured, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fused_attn.testing import Case, Inputs, make_inputs

SCORES = ("dot", "general", "concat")


@dataclass(frozen=True)
class Shape:
    """B, T, S and the common width D = E = A."""

    name: str
    batch: int
    queries: int
    source: int
    width: int

    def __str__(self) -> str:
        sizes = f"B={self.batch} T={self.queries} S={self.source} D=E=A={self.width}"
        return f"{self.name} ({sizes})"


# A training batch of `fused-attn train g2p`: letters in, phones out.
G2P = Shape("g2p", 256, 10, 10, 512)
# A training batch of translated sentences.
SENTENCES = Shape("sentences", 16, 64, 256, 512)


def inputs_of(shape: Shape, score: str, dtype: torch.dtype = torch.float32) -> Inputs:
    """Random inputs, with the lengths of a batch of sentences: from half of S to all of it.

    The gradients come back for the context only, as in training: nobody differentiates the picture.
    """
    case = Case(
        score, dtype, shape.batch, shape.queries, shape.source,
        query_dim=shape.width, memory_dim=shape.width, attn_dim=shape.width, weights=False,
    )  # fmt: skip
    inputs = make_inputs(case)
    generator = torch.Generator().manual_seed(1)
    low = max(1, shape.source // 2)
    lengths = torch.randint(low, shape.source + 1, (shape.batch,), generator=generator)
    lengths[0] = shape.source
    masking = inputs.masking._replace(memory_lengths=lengths)
    return Inputs(score, inputs.tensors, masking, inputs.scale, inputs.grad_context, None)
