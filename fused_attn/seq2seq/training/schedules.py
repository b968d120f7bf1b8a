"""Schedules of the learning rate and of scheduled sampling.

Scheduled sampling: Bengio et al. 2015, "Scheduled Sampling for Sequence Prediction with Recurrent
Neural Networks".
"""

from __future__ import annotations

import math

from fused_attn.seq2seq.config import TrainingConfig

# Over the whole schedule the exponential decays to this, and the sigmoid has this steepness.
_DECAY = 0.01
_STEEPNESS = 12.0
_PLATEAU_FACTOR = 0.5


def planned_steps(batches_per_epoch: int, config: TrainingConfig, extra: int = 0) -> int:
    """Return the number of optimizer steps of a whole run.

    extra: steps beyond those of ``config.epochs`` epochs; see `Position`.
    """
    steps = batches_per_epoch * config.epochs + extra
    return steps if config.max_steps is None else min(steps, config.max_steps)


def learning_rate(step: int, total: int, config: TrainingConfig, plateaus: int = 0) -> float:
    """Return the learning rate of a step in 0..total - 1: a linear warm-up, then the schedule.

    A falling schedule would reach 0 one step after the last, so the last step still learns.

    plateaus: number of epochs so far without a new best development metric.
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
    """Return the probability of scheduled sampling; it rises to ``largest``.

    schedule: one of `config.SCHEDULES`. "exponential" rises fast at first, "inverse-sigmoid" slowly
        at both ends.
    progress: from 0 at the start of the schedule to 1 at its end.

    Raises ValueError if the schedule is unknown.
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
        raise ValueError(f"unknown schedule {schedule!r}")
    first, last = _sigmoid(0.0), _sigmoid(1.0)
    return largest * (_sigmoid(progress) - first) / (last - first)


def _sigmoid(progress: float) -> float:
    return 1.0 / (1.0 + math.exp(-_STEEPNESS * (progress - 0.5)))
