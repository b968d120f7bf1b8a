"""Small untrained models that are written as checkpoints, for tests of the commands."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fused_attn.seq2seq.config import ModelConfig
from fused_attn.seq2seq.inference.predictor import Predictor
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.tasks.text import Pairs, PairsConfig
from fused_attn.seq2seq.vocabulary import EOS, Vocabulary

# Letters to words, some with letters that are not ASCII.
LETTERS = "abcdeé"
WORDS = ("ein", "zwei", "drei", "fünf", "zwölf", "文字")


def predictor(
    letters: Iterable[str] = LETTERS,
    words: Iterable[str] = WORDS,
    *,
    seed: int = 0,
    sharpness: float = 8.0,
    ending: float = 0.0,
    longest_source: int | None = None,
    tokens: dict[str, str] | None = None,
    **options: Any,
) -> Predictor:
    """A model in float32 with random parameters.

    sharpness: the larger, the more its targets differ. ending: the larger, the shorter they are.
    """
    source, target = Vocabulary(letters), Vocabulary(words)
    torch.manual_seed(seed)
    config = ModelConfig(hidden=12, embedding=8, **options)
    model = Seq2Seq(config, len(source), len(target)).eval()
    with torch.no_grad():
        model.output.weight *= sharpness
        model.output.bias[EOS] += ending
    kinds = tokens or {"source_tokens": "chars", "target_tokens": "words"}
    task = Pairs(PairsConfig(**kinds))  # type: ignore[arg-type]
    return Predictor(model, source, target, task=task, longest_source=longest_source)


def checkpoint(directory: Path, **options: Any) -> Path:
    """Write `predictor` as a checkpoint."""
    predictor(**options).save(directory)
    return directory
