"""What a run is made of: the shape of the model and the recipe of the training.

Plain values, checked when they are made; the command line shows their defaults. No torch here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

CELLS = ("lstm", "gru")
SCORES = ("dot", "general", "concat")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a `Seq2Seq` model.

    cell: recurrent cell of encoder and decoder.
    hidden: width D of the decoder state and of the attentional state; each direction of the
        encoder is as wide.
    embedding: width of the embeddings of source and target symbols.
    layers: number of recurrent layers, in encoder and decoder alike.
    bidirectional: also read the source from its end; the memory is then 2 * hidden wide.
    score: of the attention. "dot" projects the memory to the decoder's width first.
    dropout: probability, on embeddings, between layers and on the attentional state.
    """

    cell: str = "lstm"
    hidden: int = 256
    embedding: int = 64
    layers: int = 1
    bidirectional: bool = True
    score: str = "general"
    dropout: float = 0.2

    def __post_init__(self) -> None:
        _check_choice("cell", self.cell, CELLS)
        _check_choice("score", self.score, SCORES)
        for name in ("hidden", "embedding", "layers"):
            _check_positive(name, getattr(self, name))
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout!r}")


@dataclass(frozen=True)
class TrainingConfig:
    """Recipe of a training.

    epochs: passes over the training pairs; the schedule of the learning rate spans them.
    batch_size: pairs in a batch.
    lr: highest learning rate of Adam, reached after the warm-up.
    warmup: share of all steps in which the rate rises to ``lr``; then it falls to 0.
    clip: largest norm of the gradient.
    seed: of the parameters, the dropout and the order of the pairs.
    max_steps: stop after so many steps, and plan the schedule for them; None for all epochs.
    """

    epochs: int = 10
    batch_size: int = 128
    lr: float = 2e-3
    warmup: float = 0.05
    clip: float = 1.0
    seed: int = 1
    max_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            _check_positive(name, getattr(self, name))
        if self.max_steps is not None:
            _check_positive("max_steps", self.max_steps)
        for name in ("lr", "clip"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        if not 0.0 <= self.warmup <= 1.0:
            raise ValueError(f"warmup must be a share in 0..1, got {self.warmup!r}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in 0..{2**32 - 1}, got {self.seed!r}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_positive(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive whole number, got {value!r}")
