"""Named problems: the shapes that are measured, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fused_attn.testing import Case, Inputs, make_inputs

SCORES = ("dot", "general", "concat")


@dataclass(frozen=True)
class Shape:
    """B, T, S, the width D of the query, and E of the memory, which is also A."""

    name: str
    batch: int
    queries: int
    source: int
    query_dim: int
    memory_dim: int

    def __str__(self) -> str:
        widths = f"D={self.query_dim} E=A={self.memory_dim}"
        sizes = f"B={self.batch} T={self.queries} S={self.source} {widths}"
        return f"{self.name} ({sizes})"


# A training batch of the demo's model (`make demo`): letters in, phones out. The recipe's default
# model is twice as wide.
G2P = Shape("g2p", 128, 8, 8, 128, 256)
# A training batch of translated sentences.
SENTENCES = Shape("sentences", 16, 64, 256, 512, 512)


def inputs_of(shape: Shape, score: str, dtype: torch.dtype = torch.float32) -> Inputs:
    """Random inputs, with the lengths of a batch of sentences: from half of S to all of it.

    The gradients come back for the context only, as in training: nobody differentiates the picture.
    """
    case = Case(
        score, dtype, shape.batch, shape.queries, shape.source,
        query_dim=shape.query_dim, memory_dim=shape.memory_dim, attn_dim=shape.memory_dim,
        weights=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    low = max(1, shape.source // 2)
    lengths = torch.randint(low, shape.source + 1, (shape.batch,), generator=generator)
    lengths[0] = shape.source
    return with_lengths(make_inputs(case), lengths)


def with_lengths(inputs: Inputs, lengths: Tensor) -> Inputs:
    """The same inputs, of which the first ``lengths`` (B,) positions count."""
    return replace(inputs, masking=inputs.masking._replace(memory_lengths=lengths))
