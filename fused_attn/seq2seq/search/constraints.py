"""Constraints on a search: target lengths, prefixes and repeated n-grams."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fused_attn.seq2seq.config import SearchConfig
from fused_attn.seq2seq.vocabulary import BOS, EOS, PAD


@dataclass(frozen=True)
class LengthBound:
    """Bounds the length of a target when `SearchConfig.max_length` is None.

    ratio: target symbols per source symbol.
    longest: symbols of the longest target in the training set.

    The bound depends only on the target's own source, so a result does not depend on the rest of
    its batch.
    """

    ratio: float = 2.0
    longest: int = 0

    def limits(self, lengths: Tensor) -> Tensor:
        """Return the largest target lengths, int64 (B,), for source lengths int64 (B,).

        For a source of n symbols that is ratio * n + 10, but at least 2 n + 10, and if more than
        that, at most longest + 10.
        """
        return lengths.new_tensor([_limit(self, length) for length in lengths.tolist()])


_MARGIN = 10


# Cached: sources have few different lengths. Computing limits as tensors took 2 % of the time of a
# word.
@lru_cache(maxsize=4096)
def _limit(bound: LengthBound, length: int) -> int:
    usual = 2 * length + _MARGIN
    exact = torch.tensor(length, dtype=torch.float32, device="cpu")  # always in float32
    by_ratio = (bound.ratio * exact).ceil().item() + _MARGIN
    return int(max(usual, min(by_ratio, max(usual, bound.longest + _MARGIN))))


def limits_of(lengths: Tensor, config: SearchConfig, bound: LengthBound) -> Tensor:
    """Return the largest target lengths, int64 (B,), for source lengths int64 (B,)."""
    if config.max_length is not None:
        return torch.full_like(lengths, config.max_length)
    return bound.limits(lengths)


def constrain(
    log_probs: Tensor,
    tokens: Tensor,
    limits: Tensor,
    config: SearchConfig,
    prefix: Tensor | None,
    shortest: int = 0,
) -> Tensor:
    """Return the log probabilities (N, V) with -inf for symbols that may not come next.

    If blocked n-grams and the minimum length leave no symbol, the target ends.

    tokens: int64 (N, t), the symbols so far, without BOS.
    limits: int64 (N,), the largest target lengths. At its limit a target must end.
    prefix: int64 (N, P), what each target must begin with, padded at the end.
    shortest: a lower bound of ``limits``, known to the host; below it ``limits`` is not read.
    """
    step, size = tokens.shape[1], log_probs.shape[1]
    is_short = step < config.min_length
    allowed = log_probs + _barred(size, is_short, log_probs.dtype, log_probs.device)
    if config.block_ngrams:
        repeats = _repeats(tokens, config.block_ngrams, size)
        allowed = allowed.masked_fill(repeats, -torch.inf)
        if is_short:
            stuck = (allowed == -torch.inf).all(dim=1)
            allowed[:, EOS] = torch.where(stuck, log_probs[:, EOS], allowed[:, EOS])
    only: Tensor | None = None  # (N,), the only symbol allowed, or -1 for no such constraint
    if prefix is not None and step < prefix.shape[1]:
        only = prefix[:, step].masked_fill(prefix[:, step] == PAD, -1)
    if step >= shortest:
        only = torch.where(limits <= step, EOS, -1 if only is None else only)
    if only is None:
        return allowed
    symbols = torch.arange(size, device=log_probs.device)
    alone = log_probs.masked_fill(symbols != only[:, None], -torch.inf)
    return torch.where(only[:, None] < 0, allowed, alone)


@lru_cache(maxsize=16)
def _barred(size: int, with_end: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(V,), to add to log probabilities: -inf for PAD, BOS and, if ``with_end``, EOS; else 0."""
    with torch.inference_mode(False):  # cached, and also used outside of inference mode
        barred = torch.zeros(size, dtype=dtype, device=device)
        for symbol in (PAD, BOS, EOS) if with_end else (PAD, BOS):
            barred[symbol] = -torch.inf
    return barred


def _repeats(tokens: Tensor, size: int, vocabulary: int) -> Tensor:
    """Bool (N, V): the symbols that would repeat an n-gram of ``size`` symbols."""
    found = torch.zeros(len(tokens), vocabulary, dtype=torch.bool, device=tokens.device)
    if tokens.shape[1] < size:
        return found
    windows = tokens.unfold(1, size, 1)
    tail = tokens[:, tokens.shape[1] - size + 1 :]
    matches = (windows[..., :-1] == tail[:, None]).all(dim=-1)
    # Windows without a match mask PAD, which is never allowed anyway.
    return found.scatter(1, torch.where(matches, windows[..., -1], PAD), True)
