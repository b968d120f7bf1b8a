"""Learning rate and scheduled sampling as functions of how far a training has come.

Scheduled sampling: Bengio et al. 2015, "Scheduled Sampling for Sequence Prediction with Recurrent
Neural Networks".
"""

from __future__ import annotations

import math

from fused_attn.seq2seq.config import TrainingConfig

# How far the exponential has fallen, and how steep the sigmoid is, over the whole schedule.
_DECAY = 0.01
_STEEPNESS = 12.0
_PLATEAU_FACTOR = 0.5


def planned_steps(batches_per_epoch: int, config: TrainingConfig) -> int:
    """Return the number of steps of a whole run."""
    steps = batches_per_epoch * config.epochs
    return steps if config.max_steps is None else min(steps, config.max_steps)


def learning_rate(step: int, total: int, config: TrainingConfig, plateaus: int = 0) -> float:
    """Return the rate of step ``step`` of 0..total-1: a linear rise to lr, then the schedule.

    The last step still learns: a fall would reach 0 one step after it. plateaus: epochs without a
    best rate so far.
    """
    warmup = max(1, math.ceil(config.warmup * total))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.lr_schedule == "constant":
        return config.lr
    if config.lr_schedule == "plateau":
        return config.lr * _PLATEAU_FACTOR**plateaus
    if config.lr_schedule == "inverse-sqrt":
        return config.lr * math.sqrt(warmup / (step + 1))
    left = (total - step) / max(1, total - warmup + 1)
    if config.lr_schedule == "linear":
        return config.lr * min(1.0, left)
    assert config.lr_schedule == "cosine"
    return config.lr * math.sin(0.5 * math.pi * min(1.0, left)) ** 2


def sampling_probability(schedule: str, progress: float, largest: float) -> float:
    """The probability at a place of the schedule; it ends at ``largest``.

    schedule: "none", or one of `config.SCHEDULES`. progress: 0 where it starts, 1 at the end.

    "exponential" rises fast and then slowly, "inverse-sigmoid" slowly at both ends.
    """
    if schedule == "none":
        return 0.0
    if schedule == "constant":
        return largest
    progress = min(max(progress, 0.0), 1.0)
    if schedule == "linear":
        return largest * progress
    if schedule == "exponential":
        return largest * (1.0 - _DECAY**progress) / (1.0 - _DECAY)
    if schedule != "inverse-sigmoid":
        raise ValueError(f"schedule is not known: {schedule!r}")
    first, last = _sigmoid(0.0), _sigmoid(1.0)
    return largest * (_sigmoid(progress) - first) / (last - first)


def _sigmoid(progress: float) -> float:
    return 1.0 / (1.0 + math.exp(-_STEEPNESS * (progress - 0.5)))
