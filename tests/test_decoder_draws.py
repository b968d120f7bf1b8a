"""Draws of the native search against exact probabilities."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from made_up_models import Case, Models, check_equal

from fused_attn.seq2seq.config import SearchConfig
from fused_attn.seq2seq.vocabulary import BOS, EOS, PAD


def check_frequencies(drawn: Counter[Any], wanted: dict[Any, float]) -> None:
    """Compare counts to probabilities by Pearson's chi-squared test.

    It fails by chance for one in 10,000 seeds. Outcomes that are expected less than 8 times count
    as one.
    """
    total = drawn.total()
    assert set(drawn) <= set(wanted)
    often = [key for key, share in wanted.items() if share * total >= 8]
    pairs = [(drawn[key], wanted[key] * total) for key in often]
    rest = total - sum(count for count, _ in pairs)
    if (expected := total - sum(mean for _, mean in pairs)) >= 8:
        pairs.append((rest, expected))
    else:
        assert rest <= 30
    statistic = sum((count - mean) ** 2 / mean for count, mean in pairs)
    freedom = max(len(pairs) - 1, 1)
    spread = 2 / (9 * freedom)  # the approximation of Wilson and Hilferty
    assert statistic < freedom * (1 - spread + 3.72 * math.sqrt(spread)) ** 3


def exact(models: Models, config: SearchConfig) -> dict[int, float]:
    """The probabilities of the first symbol of a draw."""
    logits, _ = models.row(0, ())
    scores = logits.double().softmax(dim=-1).mean(dim=0).log() / config.temperature
    scores[[PAD, BOS]] = -math.inf
    if config.min_length:
        scores[EOS] = -math.inf
    shares = scores.softmax(dim=0).tolist()
    kept, before = {}, 0.0
    for symbol in sorted(range(len(shares)), key=lambda i: -shares[i])[: config.top_k or None]:
        if before < config.top_p and shares[symbol] > 0:
            kept[symbol] = shares[symbol]
        before += shares[symbol]
    return {symbol: share / sum(kept.values()) for symbol, share in kept.items()}


DRAWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.4},
    "hot": {"temperature": 3.0},
    "top-k": {"top_k": 5},
    "many of top-k": {"top_k": 150},
    "top-p": {"top_p": 0.5},
    "most of top-p": {"top_p": 0.98, "temperature": 2.0},
    "both": {"top_k": 40, "top_p": 0.7, "temperature": 1.3},
    "no end": {"min_length": 2},
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("size", [6, 200])
def test_draws_follow_the_probabilities(size: int, name: str) -> None:
    models = Models(size, size, [1] * 8000, constant=True, ending=1.0)
    config = SearchConfig(sample=True, seed=4, max_length=2, **DRAWS[name])
    found = Case(models, config).by_native()
    drawn = Counter((best.tokens or [EOS])[0] for (best,) in found)
    check_frequencies(drawn, exact(models, config))
    logits = models.row(0, ())[0][0].double().log_softmax(dim=-1).tolist()
    for (best,) in found[:50]:
        assert best.token_log_probs == pytest.approx([logits[t] for t in best.tokens], abs=1e-5)
        assert best.log_prob == pytest.approx(sum(logits[t] for t in [*best.tokens, EOS]), abs=1e-5)


def test_draws_of_an_ensemble_follow_the_mean_probabilities() -> None:
    models = Models(2, 30, [1] * 8000, count=3, constant=True)
    config = SearchConfig(sample=True, seed=9, max_length=1, top_p=0.9, temperature=0.8)
    drawn = Counter((best.tokens or [EOS])[0] for (best,) in Case(models, config).by_native())
    check_frequencies(drawn, exact(models, config))


def test_the_check_of_frequencies_notices_another_temperature() -> None:
    models = Models(64, 64, [1] * 8000, constant=True)
    config = SearchConfig(sample=True, seed=4, max_length=1)
    drawn = Counter((best.tokens or [EOS])[0] for (best,) in Case(models, config).by_native())
    with pytest.raises(AssertionError):
        check_frequencies(drawn, exact(models, replace(config, temperature=1.1)))


def test_draws_of_steps_and_sentences_are_independent() -> None:
    models = Models(1, 6, [1] * 150, constant=True, sharpness=1.0)
    config = SearchConfig(sample=True, seed=3, min_length=60, max_length=60)
    targets = [best.tokens for (best,) in Case(models, config).by_native()]
    assert {len(target) for target in targets} == {60}
    shares = exact(models, config)
    pairs = {(i, j): p * q for i, p in shares.items() for j, q in shares.items()}
    steps = Counter(pair for t in targets for pair in zip(t[::2], t[1::2], strict=True))
    check_frequencies(steps, pairs)
    beside = zip(targets[::2], targets[1::2], strict=True)
    check_frequencies(Counter(pair for x, y in beside for pair in zip(x, y, strict=True)), pairs)


def test_a_seed_repeats_the_draw() -> None:
    models = Models(1, 20, [4] * 10)
    config = SearchConfig(sample=True, seed=5)
    targets = [
        [best.tokens for (best,) in Case(models, replace(config, seed=seed)).by_native()]
        for seed in (5, 5, 6)
    ]
    assert targets[0] == targets[1] != targets[2]


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-30}])
@pytest.mark.parametrize("count", [1, 2])
def test_draws_from_one_symbol_are_greedy(count: int, options: dict[str, Any]) -> None:
    models = Models(6, 15, [1, 2, 3, 4], count=count, ending=1.0)
    rest: dict[str, Any] = {"block_ngrams": 2, "min_length": 4, "coverage_penalty": 0.5}
    drawn = Case(models, SearchConfig(sample=True, seed=1, **options, **rest), None, True)
    greedy = Case(models, SearchConfig(**rest), None, True)
    check_equal(drawn.by_native(), greedy.by_native())


def test_a_draw_that_is_stuck_ends() -> None:
    models = Models(8, 6, [9] * 20, ending=-50.0)
    config = SearchConfig(sample=True, seed=2, block_ngrams=1, min_length=8)
    for (best,) in Case(models, config).by_native():
        assert sorted(best.tokens) == [3, 4, 5]
