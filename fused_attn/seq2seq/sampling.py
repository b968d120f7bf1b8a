"""How often a decoder in training is given its own symbol in place of the right one.

Bengio et al. 2015, "Scheduled Sampling for Sequence Prediction with Recurrent Neural Networks".
"""

from __future__ import annotations

import math

# How far the exponential has fallen, and how steep the sigmoid is, over the whole schedule.
_DECAY = 0.01
_STEEPNESS = 12.0


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
