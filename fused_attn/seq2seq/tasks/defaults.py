"""Defaults that follow the vocabularies and the number of training pairs.

This module does not import torch. docs/measured.md has the measurements behind the rules.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

from fused_attn.seq2seq.config import ModelConfig, TrainingConfig

# The fields that may follow the data, and in which direction.
FOLLOWING = {"embedding": "more", "epochs": "more", "batch_size": "less"}
# Vocabularies of more symbols than this get an embedding of at least WIDE_EMBEDDING.
SMALL_VOCABULARY = 200
WIDE_EMBEDDING = 256
# A run sees at least this many pairs, repetitions included, unless that takes too many epochs.
PAIRS_SEEN = 40_000
MOST_EPOCHS = 100
# Batches are halved until an epoch has this many, but not below SMALLEST_BATCH.
BATCHES_PER_EPOCH = 125
SMALLEST_BATCH = 32


def defaults(
    model: ModelConfig,
    training: TrainingConfig,
    given: Collection[str],
    pairs: int,
    source_size: int,
    target_size: int,
) -> tuple[ModelConfig, TrainingConfig, list[str]]:
    """Adapt the embedding, the number of epochs and the batch size to the data.

    ``model`` and ``training`` are the defaults for small vocabularies and many pairs: the embedding
    and the number of epochs only grow, and the batch size only shrinks. Batches that count symbols
    (``batch_tokens``) stay as they are.

    given: names of the fields to leave as they are, because the user or an earlier model set them.
    pairs: number of training pairs, at least 1.
    source_size, target_size: number of symbols in the vocabularies.

    Returns the two configurations, and notes for the user about what has changed.
    """
    notes = []
    size, side = max((source_size, "source"), (target_size, "target"))
    embedding = _embedding(model, size)
    if embedding != model.embedding and "embedding" not in given:
        model = replace(model, embedding=embedding)
        notes.append(f"embedding {embedding} ({size:,} {side} symbols)")
    epochs = training.epochs if "epochs" in given else _epochs(training, pairs)
    batch = training.batch_size if "batch_size" in given else _batch_size(training, pairs)
    parts = [f"{epochs} epochs"] if epochs != training.epochs else []
    parts += [f"batches of {batch}"] if batch != training.batch_size else []
    if parts:
        training = replace(training, epochs=epochs, batch_size=batch)
        notes.append(f"{' of '.join(parts)} ({pairs:,} pairs)")
    return model, training, notes


def _embedding(model: ModelConfig, size: int) -> int:
    """The width for a vocabulary of this size, at most the width of the decoder.

    Residual connections depend on the width, so a model with them keeps its own.
    """
    if model.residual or size <= SMALL_VOCABULARY:
        return model.embedding
    return max(model.embedding, min(WIDE_EMBEDDING, model.hidden))


def _epochs(training: TrainingConfig, pairs: int) -> int:
    return max(training.epochs, min(MOST_EPOCHS, math.ceil(PAIRS_SEEN / pairs)))


def _batch_size(training: TrainingConfig, pairs: int) -> int:
    size = training.batch_size
    if training.batch_tokens is None:
        while size // 2 >= SMALLEST_BATCH and pairs < BATCHES_PER_EPOCH * size:
            size //= 2
    return size
