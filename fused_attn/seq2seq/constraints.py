"""Which symbols a search may take next."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_attn.seq2seq.config import SearchConfig
from fused_attn.seq2seq.vocabulary import BOS, EOS, PAD


@dataclass(frozen=True)
class LengthBound:
    """How long a target may get where a search is not told.

    ratio: symbols for one of the source; longest: those of the longest target in training.

    It goes by a target's own source, so that a result does not depend on the rest of its batch.
    """

    ratio: float = 2.0
    longest: int = 0

    def limits(self, lengths: Tensor) -> Tensor:
        """The most symbols for sources of these lengths, int64 (B,)."""
        usual = 2 * lengths + _MARGIN
        by_ratio = (self.ratio * lengths).ceil().long() + _MARGIN
        return torch.minimum(by_ratio, usual.clamp(min=self.longest + _MARGIN)).maximum(usual)


_MARGIN = 10


def limits_of(lengths: Tensor, config: SearchConfig, bound: LengthBound) -> Tensor:
    """The most symbols that each target may have, int64 (B,)."""
    if config.max_length is not None:
        return torch.full_like(lengths, config.max_length)
    return bound.limits(lengths)


def constrain(
    log_probs: Tensor, tokens: Tensor, limits: Tensor, config: SearchConfig, prefix: Tensor | None
) -> Tensor:
    """Return the log-probabilities (N, V) with -inf for what may not come next.

    tokens: int64 (N, t), the symbols so far, without BOS. limits: int64 (N,). prefix: int64 (N, P)
    that each target has to begin with, padded; nothing else is allowed there.
    """
    step = tokens.shape[1]
    allowed = torch.ones_like(log_probs, dtype=torch.bool)
    allowed[:, PAD] = allowed[:, BOS] = False
    if step < config.min_length:
        allowed[:, EOS] = False
    if config.block_ngrams:
        allowed &= ~_repeats(tokens, config.block_ngrams, log_probs.shape[1])
    only = torch.full_like(limits, -1)
    if prefix is not None and step < prefix.shape[1]:
        only = torch.where(prefix[:, step] == PAD, only, prefix[:, step])
    only = torch.where(limits <= step, EOS, only)
    symbols = torch.arange(log_probs.shape[1], device=log_probs.device)
    allowed = torch.where(only[:, None] >= 0, symbols == only[:, None], allowed)
    return log_probs.masked_fill(~allowed, -torch.inf)


def _repeats(tokens: Tensor, size: int, vocabulary: int) -> Tensor:
    """Bool (N, V): the symbols that would complete a sequence of ``size`` that was there before."""
    found = torch.zeros(len(tokens), vocabulary, dtype=torch.bool, device=tokens.device)
    if tokens.shape[1] < size:
        return found
    windows = tokens.unfold(1, size, 1)
    tail = tokens[:, tokens.shape[1] - size + 1 :]
    matches = (windows[..., :-1] == tail[:, None]).all(dim=-1)
    # PAD for those that do not match: it is not allowed anyway.
    return found.scatter(1, torch.where(matches, windows[..., -1], PAD), True)
