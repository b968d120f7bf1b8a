"""What a search finds, and what its finds are compared by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_attn.seq2seq.config import SearchConfig


@dataclass(frozen=True)
class Hypothesis:
    """A target found for one source."""

    tokens: list[int]  # without BOS and EOS
    log_prob: float  # of the whole target, EOS included, in nats
    score: float  # what hypotheses are compared by: with length and coverage penalty
    weights: Tensor | None  # alignment (T, S), a row for each token; None if not asked for
    token_log_probs: list[float]  # of each token, in nats, without EOS


def length_penalty(length: Tensor | float, config: SearchConfig) -> Tensor | float:
    """What a log-probability is divided by; length counts EOS."""
    if config.length_penalty == "average":
        return length
    if config.length_penalty == "gnmt":
        return ((5.0 + length) / 6.0) ** config.alpha
    return 1.0


def coverage_penalty(coverage: Tensor, lengths: Tensor, config: SearchConfig) -> Tensor:
    """beta sum_s log(min(sum_t a_ts, 1)) (Wu et al. 2016, eq. 14) of coverage (N, S)."""
    inside = torch.arange(coverage.shape[1], device=coverage.device) < lengths[:, None]
    # A position that was never looked at costs as one that got a millionth.
    logs = coverage.clamp(1e-6, 1.0).log().masked_fill(~inside, 0.0)
    return config.coverage_penalty * logs.sum(dim=1)
