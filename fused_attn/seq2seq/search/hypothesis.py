"""The result of a search, and the penalties that rank results."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_attn.seq2seq.config import SearchConfig
from fused_attn.seq2seq.errors import InputError


@dataclass(frozen=True)
class Hypothesis:
    """A target found for a source."""

    tokens: list[int]  # ids without BOS and EOS
    log_prob: float  # of the whole target, EOS included, in nats
    score: float  # for ranking: log_prob with length and coverage penalties
    weights: Tensor | None  # alignment (T, S), one row per token; None if not asked for
    token_log_probs: list[float]  # of each token, without EOS, in nats


def not_numbers() -> InputError:
    """Return the error to raise for a model whose probabilities cannot rank targets."""
    return InputError(
        "the probabilities of the model are not finite numbers: "
        "its parameters or states are too large, or not finite"
    )


def length_penalty(length: Tensor | float, config: SearchConfig) -> Tensor | float:
    """Return the divisor of the log probability of a target of ``length`` symbols, EOS included.

    "gnmt" is Wu et al. 2016, "Google's Neural Machine Translation System", eq. 14.
    """
    if config.length_penalty == "average":
        return length
    if config.length_penalty == "gnmt":
        return ((5.0 + length) / 6.0) ** config.alpha
    return 1.0


def coverage_penalty(coverage: Tensor, lengths: Tensor, config: SearchConfig) -> Tensor:
    """Return beta sum_s log(min(sum_t a_ts, 1)), (N,) (Wu et al. 2016, eq. 14).

    coverage: (N, S), the weights summed over the target. lengths: int64 (N,), of the sources.
    """
    inside = torch.arange(coverage.shape[1], device=coverage.device) < lengths[:, None]
    # A position that got no attention costs the same as one that got a millionth: log(0) is -inf.
    logs = coverage.clamp(1e-6, 1.0).log().masked_fill(~inside, 0.0)
    return config.coverage_penalty * logs.sum(dim=1)
