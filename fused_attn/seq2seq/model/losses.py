"""Losses of the predictions and the alignments, each summed over the target symbols, in nats."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from fused_attn.seq2seq.data.soft_targets import SoftTargets
from fused_attn.seq2seq.vocabulary import PAD


def entropy(logits: Tensor, expected: Tensor, label_smoothing: float) -> Tensor:
    """Return the summed cross-entropy of logits (B, T, V) and symbols int64 (B, T), no padding."""
    return cross_entropy(
        logits.flatten(0, 1),
        expected.flatten(),
        ignore_index=PAD,
        label_smoothing=label_smoothing,
        reduction="sum",
    )


def guided_alignment_loss(weights: Tensor, alignment: Tensor) -> Tensor:
    """Return the cross-entropy of the alignment weights and a known alignment, both (B, T, S).

    Chen et al. 2016, "Guided Alignment Training for Topic-Aware Neural Machine Translation", eq. 4.
    """
    # Adding 1e-8 bounds the gradient where a weight is close to 0.
    return -(alignment * torch.log(weights.float() + 1e-8)).sum()


def rdrop_loss(logits: Tensor, expected: Tensor) -> Tensor:
    """Return the mean of the two Kullback-Leibler divergences between two forward passes.

    Liang et al. 2021, "R-Drop: Regularized Dropout for Neural Networks", eq. 2. The gradient flows
    into both passes.

    logits: (2 B, T, V), the first pass followed by the second.
    expected: int64 (2 B, T), the target symbols. Padding does not count.
    """
    first, second = log_softmax(logits.float(), dim=-1).chunk(2)
    # KL(p|q) + KL(q|p) = sum (p - q) (log p - log q)
    both = ((first.exp() - second.exp()) * (first - second)).sum(dim=-1)
    return 0.5 * both.masked_fill(expected[: len(both)] == PAD, 0.0).sum()


def soft_target_loss(logits: Tensor, soft_targets: SoftTargets) -> Tensor:
    """Return the cross-entropy of logits (B, T, V) and the teachers' probabilities.

    Kim & Rush 2016, "Sequence-Level Knowledge Distillation", section 2.2.
    """
    log_probs = log_softmax(logits.float(), dim=-1).gather(2, soft_targets.symbols)
    return -(soft_targets.probabilities * log_probs).sum()
