"""How good a model is: its targets, or their likelihood, against the references."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from fused_attn.seq2seq.config import SearchConfig
from fused_attn.seq2seq.data.examples import Examples
from fused_attn.seq2seq.data.pairs import Item, Pair, Symbols, grouped
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.inference.predictor import BATCH_SIZE, Predictor
from fused_attn.seq2seq.metrics import PERPLEXITY, ErrorRates, error_rates
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
    return [found.tokens for found in predictor.predict([item.source for item in items], config)]


def judge(found: Sequence[Symbols], items: Sequence[Item]) -> ErrorRates:
    """Compare targets with the items' references, of which the nearest counts."""
    return error_rates((target, i.references) for target, i in zip(found, items, strict=True))


def measures(task: Task, found: Sequence[Symbols], items: Sequence[Item]) -> dict[str, float]:
    """Return the task's measures of targets by name: those of quality, then the error rates."""
    return {**task.quality(found, items), **rates(task, judge(found, items))}


def rates(task: Task, errors: ErrorRates) -> dict[str, float]:
    """Return the error rates by the task's names."""
    found = (errors.sequence_error_rate, errors.symbol_error_rate)
    return dict(zip(task.rates, found, strict=True))


def evaluate(
    predictor: Predictor, pairs: str | Path | Iterable[tuple[Any, Any]], **search: Any
) -> dict[str, float]:
    """Measure a model on pairs: the task's measures by name, such as WER and PER, in 0..1.

    Args:
        predictor: from `load` or `fit`.
        pairs: source and target texts, or sequences of tokens; or a file, as `fused-attn evaluate
            --test` reads it. Targets of one source are alternatives, of which the nearest counts.
        search: fields of `SearchConfig`, such as ``beam=5``.

    Raises `InputError` if a pair or the file cannot be used, or there are no pairs.
    """
    task = predictor.task
    if isinstance(pairs, (str, Path)):
        items, _ = task.listed(Path(pairs))
    else:
        items = grouped(_pair(predictor, number, each) for number, each in enumerate(pairs, 1))
    if not items:
        raise InputError("there are no pairs to evaluate on")
    found = targets(predictor, items, SearchConfig(**search))
    result = measures(task, found, items)
    if task.by_perplexity:
        result = {PERPLEXITY: perplexity(predictor, items), **result}
    return result


def _pair(predictor: Predictor, number: int, pair: tuple[Any, Any]) -> Pair:
    try:
        source, target = pair
        tokens = target
        if isinstance(target, str):
            tokens = predictor.task.read_target(target)
        return Pair(predictor.read(source), tuple(tokens))
    except (TypeError, ValueError):
        raise InputError(f"pair {number}: expected a source and a target, got {pair!r}") from None
    except InputError as error:
        raise InputError(f"pair {number}: {error}") from None
