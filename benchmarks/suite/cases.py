"""The cases of the suite: calls of attention as models make them, each with its origin."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from benchmarks.common.problems import Row, Sizes, dtype_name


@dataclass(frozen=True)
class Case:
    """A call with its name and origin.

    row: score, sizes, dtype, forward or both passes. quick: whether the short suite has it.
    """

    name: str
    origin: str
    row: Row
    quick: bool = False

    @property
    def id(self) -> str:
        """Names the case in all result files."""
        row = self.row
        way = "both" if row.backward else "forward"
        sizes = "x".join(map(str, row.sizes))
        return f"{self.name}/{row.score}/{dtype_name(row.dtype)}/{sizes}/{way}"


def _case(
    name: str, origin: str, sizes: Sizes, scores: str, *, both: bool = False, quick: str = ""
) -> list[Case]:
    """A case for each score in ``scores``; those in ``quick`` are in the short suite."""
    return [
        Case(
            name,
            origin,
            Row(score, sizes, backward=both, prepared=score == "projected"),
            score in quick.split(),
        )
        for score in scores.split()
    ]


# For concat, a decoding step takes finished projections ("projected"): they are made once for each
# sentence.
OPERATORS: tuple[Case, ...] = (
    *_case(
        "IWSLT greedy step", "a batch of 32 TED sentences, one symbol each",
        Sizes(32, 1, 25, 512), "dot general projected", quick="dot projected",
    ),
    *_case(
        "document summary, a step", "See et al. 2017: 400 words of an article",
        Sizes(64, 1, 400, 512), "dot projected", quick="dot projected",
    ),
    *_case(
        "GNMT inference", "NVIDIA's GNMT: 128 sentences in beams of 10",
        Sizes(1280, 1, 66, 1024), "dot projected",
    ),
    *_case(
        "tensorexpr attention", "PyTorch's benchmarks/tensorexpr/attention.py",
        Sizes(128, 10, 128, 1024), "projected",
    ),
    *_case(
        "pronunciations, training", "the recipe of `fused-attn train g2p`",
        Sizes(128, 8, 8, 256), "dot general concat", both=True, quick="concat",
    ),
    *_case(
        "translation, training", "a batch of 64 sentences of IWSLT",
        Sizes(64, 40, 50, 512), "dot general concat", both=True, quick="dot concat",
    ),
    *_case(
        "speech encoder, training", "Listen, Attend and Spell: 800 frames, 60 letters",
        Sizes(8, 60, 800, 512), "dot concat", both=True,
    ),
    *_case(
        "overhead of a call", "the smallest decoder that people train",
        Sizes(2, 1, 12, 64), "dot projected", quick="dot",
    ),
)  # fmt: skip


def cases(*, quick: bool, only: str = "") -> list[Case]:
    """The operator cases; in the full suite, dot training steps in bfloat16 as well."""
    chosen = [case for case in OPERATORS if case.quick or not quick]
    if not quick:
        chosen += [
            replace(case, row=replace(case.row, dtype=torch.bfloat16))
            for case in OPERATORS
            if case.row.backward and case.row.score == "dot"
        ]
    return [case for case in chosen if only.lower() in case.id.lower()]
