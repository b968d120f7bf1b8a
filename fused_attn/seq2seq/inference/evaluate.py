"""How good a model is: its targets, or their likelihood, against the right ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fused_attn.seq2seq.config import SearchConfig
from fused_attn.seq2seq.data.examples import Examples
from fused_attn.seq2seq.data.pairs import Item, Symbols
from fused_attn.seq2seq.inference.predictor import BATCH_SIZE, Predictor
from fused_attn.seq2seq.metrics import ErrorRates, error_rates
from fused_attn.seq2seq.tasks.base import Task


@torch.inference_mode()
def perplexity(predictor: Predictor, items: Sequence[Item]) -> float:
    """e to the mean loss in nats of a symbol, EOS included, over all references of the items.

    By the first model of the predictor.
    """
    pairs = [(item.source, reference) for item in items for reference in item.references]
    examples = Examples.of(
        [predictor.source.encode(source) for source, _ in pairs],
        [predictor.target.encode(target) for _, target in pairs],
    )
    loss = torch.zeros((), dtype=torch.float64, device=predictor.device)
    tokens = 0
    for rows in torch.arange(len(examples)).split(BATCH_SIZE):
        batch = examples.batch(rows).to(predictor.device)
        mean = predictor.models[0].loss(batch.source, batch.source_lengths, batch.target)
        loss += mean.double() * batch.tokens
        tokens += batch.tokens
    return math.exp(loss.item() / tokens)


def targets(
    predictor: Predictor,
    items: Sequence[Item],
    config: SearchConfig = SearchConfig(),  # noqa: B008, it is frozen
) -> list[Symbols]:
    """Return the models' best target for each item."""
    return [found.target for found in predictor.best([item.source for item in items], config)]


def judge(found: Sequence[Symbols], items: Sequence[Item]) -> ErrorRates:
    """Compare targets with the items' references, of which the nearest counts."""
    return error_rates((target, i.references) for target, i in zip(found, items, strict=True))


def rates(task: Task, errors: ErrorRates) -> dict[str, float]:
    """Return the error rates by the task's names."""
    found = (errors.sequence_error_rate, errors.symbol_error_rate)
    return dict(zip(task.rates, found, strict=True))
