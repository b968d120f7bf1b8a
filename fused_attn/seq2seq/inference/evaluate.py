"""Evaluation: predicted targets against references, and the perplexity of the references."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from fused_attn.seq2seq.config import SearchConfig
from fused_attn.seq2seq.data.examples import Examples
from fused_attn.seq2seq.data.pairs import Item, Pair, Symbols, grouped
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.inference.engine import search_config
from fused_attn.seq2seq.inference.predictor import BATCH_SIZE, Predictor
from fused_attn.seq2seq.metrics import PERPLEXITY, ErrorRates, error_rates
from fused_attn.seq2seq.model.modes import evaluating
from fused_attn.seq2seq.search.hypothesis import not_numbers
from fused_attn.seq2seq.tasks.base import Task


@torch.inference_mode()
def perplexity(predictor: Predictor, items: Sequence[Item]) -> float:
    """Return the perplexity of all references: exp of the mean loss per symbol, EOS included.

    Only the first model of an ensemble is used. Raises `InputError` if the perplexity is too large
    for a number, or nan.
    """
    pairs = [(item.source, reference) for item in items for reference in item.references]
    examples = Examples.of(
        [predictor.source.encode(source) for source, _ in pairs],
        [predictor.target.encode(target) for _, target in pairs],
    )
    loss = torch.zeros((), dtype=torch.float64, device=predictor.device)
    tokens = 0
    model = predictor.models[0]
    with evaluating([model]):
        for rows in torch.arange(len(examples)).split(BATCH_SIZE):
            batch = examples.batch(rows).to(predictor.device)
            mean = model.loss(batch.source, batch.source_lengths, batch.target)
            loss += mean.double() * batch.tokens
            tokens += batch.tokens
    nats = loss.item() / tokens
    if not nats < math.log(sys.float_info.max):
        raise not_numbers()
    return math.exp(nats)


def targets(
    predictor: Predictor,
    items: Sequence[Item],
    config: SearchConfig = SearchConfig(),  # noqa: B008, it is frozen
    batch_size: int = BATCH_SIZE,
) -> list[Symbols]:
    """Return the best target for the source of each item."""
    sources = predictor.read_all([item.source for item in items])
    return [found.tokens for found in predictor.decode(sources, config, batch_size=batch_size)]


def judge(found: Sequence[Symbols], items: Sequence[Item]) -> ErrorRates:
    """Compare each target with the nearest reference of its item."""
    return error_rates((target, i.references) for target, i in zip(found, items, strict=True))


def measures(task: Task, found: Sequence[Symbols], items: Sequence[Item]) -> dict[str, float]:
    """Return the metrics of the task by name: quality metrics first, then error rates."""
    return {**task.quality(found, items), **rates(task, judge(found, items))}


def rates(task: Task, errors: ErrorRates) -> dict[str, float]:
    """Return the sequence and symbol error rates under the names that the task gives them."""
    found = (errors.sequence_error_rate, errors.symbol_error_rate)
    return dict(zip(task.rates, found, strict=True))


def evaluate(
    predictor: Predictor,
    pairs: str | Path | Iterable[tuple[Any, Any]],
    *,
    batch_size: int = BATCH_SIZE,
    **search: Any,
) -> dict[str, float]:
    """Evaluate a model on pairs and return the metrics of its task by name, such as WER and PER.

    Args:
        predictor: from `load` or `fit`.
        pairs: (source, target) tuples of texts or token sequences; or the path of a file, as for
            ``fused-attn evaluate --test``. If a source occurs several times, its targets are
            alternative references, and the nearest one counts.
        batch_size: number of sources decoded together.
        search: fields of `SearchConfig`, such as ``beam=5``.

    Returns rates as fractions in 0..1, not in per cent; for a task evaluated by perplexity, also
    the perplexity.

    Raises `InputError` if a pair or the file cannot be used, or there are no pairs; TypeError if
    ``predictor`` is not a `Predictor`. Warns once, with a UserWarning, if sources are longer than
    those of the training.
    """
    if not isinstance(predictor, Predictor):
        raise TypeError(f"predictor must be from load or fit, got {type(predictor).__name__}")
    if not isinstance(pairs, Iterable) and not isinstance(pairs, Path):
        raise InputError(f"expected pairs or the path of a file, got {type(pairs).__name__}")
    config = search_config(search)
    task = predictor.task
    if isinstance(pairs, (str, Path)):
        items, _ = task.listed(Path(pairs))
    else:
        items = grouped(_pair(predictor, number, each) for number, each in enumerate(pairs, 1))
    if not items:
        raise InputError("there are no pairs to evaluate on")
    sources = predictor.read_all([item.source for item in items])
    predictor.warn_of_long(sources)
    found = [each.tokens for each in predictor.decode(sources, config, batch_size=batch_size)]
    result = measures(task, found, items)
    if task.by_perplexity:
        result = {PERPLEXITY: perplexity(predictor, items), **result}
    return result


def _pair(predictor: Predictor, number: int, pair: tuple[Any, Any]) -> Pair:
    try:
        if isinstance(pair, str):
            raise TypeError
        source, target = pair
        read = predictor.task.read_target
        found = Pair(
            predictor.read(source), read(target) if isinstance(target, str) else tuple(target)
        )
    except (TypeError, ValueError):
        raise InputError(f"pair {number}: expected a source and a target, got {pair!r}") from None
    except InputError as error:
        raise InputError(f"pair {number}: {error}") from None
    for name, tokens in (("source", found.source), ("target", found.target)):
        if not tokens:
            raise InputError(f"pair {number}: the {name} is empty")
    return found
