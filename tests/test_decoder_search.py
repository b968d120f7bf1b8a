"""The native search against the search in Python, both over the same made-up models."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
from made_up_models import (
    PENALTIES,
    Case,
    Models,
    check_against_python,
    check_equal,
    native,
    outcome,
)

from fused_attn.seq2seq.config import SearchConfig
from fused_attn.seq2seq.vocabulary import BOS, EOS


def random_prefix(rng: random.Random, vocabulary: int) -> list[int]:
    symbols = range(3, vocabulary) if vocabulary > 3 else [EOS]
    return [rng.choice(symbols) for _ in range(rng.choice([0, 0, 1, 2, 3, 6]))]


def random_case(seed: int, *, beam: int | None = None, odd: bool = False) -> Case:
    """odd: logits of -inf, nan and inf."""
    rng = random.Random(seed)
    vocabulary = rng.choice([3, 4, 5, 6, 9, 20, 50])
    sources = [rng.randint(1, 7) for _ in range(rng.choice([1, 2, 3, 6]))]
    models = Models(
        seed=seed,
        vocabulary=vocabulary,
        sources=sources,
        count=rng.choice([1, 1, 1, 2, 3]),
        attends=rng.random() < 0.8,
        ending=rng.choice([-3.0, 0.0, 0.0, 1.0, 3.0]),
        sharpness=rng.choice([0.3, 2.0, 2.0, 6.0]),
        never=rng.choice([0.0, 0.1, 0.4]) if odd else 0.0,
        broken=rng.choice([None, None, 0, 2]) if odd else None,
        value=rng.choice([math.nan, math.inf, -math.inf]),
    )
    beams = rng.choice([2, 3, 5, 8]) if beam is None else beam
    longest = rng.choice([None, 1, 2, 4, 8])
    config = SearchConfig(
        beam=beams,
        nbest=rng.randint(1, beams),
        nbest_mass=rng.choice([None, None, 0.05, 0.6, 1.0]),
        length_penalty=rng.choice(list(PENALTIES)),
        alpha=rng.choice([0.0, 0.6, 1.5]),
        coverage_penalty=rng.choice([0.0, 0.0, 0.3, 2.0]),
        min_length=min(rng.choice([0, 0, 1, 3, 8]), longest or 8),
        max_length=longest,
        block_ngrams=rng.choice([0, 0, 0, 1, 2, 3]),
    )
    prefixes = None
    if rng.random() < 0.4:
        prefixes = [random_prefix(rng, vocabulary) for _ in sources]
    return Case(models, config, prefixes, return_weights=rng.random() < 0.6)


@pytest.mark.parametrize("seed", range(150))
def test_greedy_search_finds_what_python_finds(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(seed, beam=1)
    check_against_python(case, monkeypatch)


@pytest.mark.parametrize("seed", range(250))
def test_beam_search_finds_what_python_finds(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(1000 + seed)
    check_against_python(case, monkeypatch)


@pytest.mark.parametrize("beam", [1, None], ids=["greedy", "beam"])
@pytest.mark.parametrize("seed", range(100))
def test_the_same_for_logits_that_are_not_finite(
    seed: int, beam: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = random_case(2000 + seed, beam=beam, odd=True)
    check_against_python(case, monkeypatch)


@pytest.mark.parametrize("isa", native.cpu_isas_supported())
def test_every_instruction_set_finds_the_same(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = native.cpu_isa()
    native.set_cpu_isa(isa)
    try:
        for seed in range(15):
            case = random_case(4000 + seed, beam=1 if seed % 3 == 0 else None, odd=seed % 2 == 0)
            check_against_python(case, monkeypatch)
    finally:
        native.set_cpu_isa(before)


@pytest.mark.parametrize("beam", [1, 4])
@pytest.mark.parametrize("sharpness", [0.05, 1.0, 8.0])
def test_ensembles_with_many_symbols(
    sharpness: float, beam: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search looks at few symbols of each model first; here often at many, or at all."""
    models = Models(3, 700, [2, 3, 4, 5], count=3, sharpness=sharpness, ending=4 * sharpness)
    case = Case(models, SearchConfig(beam=beam, nbest=beam, max_length=6, block_ngrams=1))
    check_equal(case.by_native(), case.by_python(monkeypatch))


EXTREMES: dict[str, dict[str, Any]] = {
    "one symbol": {"max_length": 1},
    "no end before the limit": {"max_length": 4, "min_length": 4},
    "no repeats": {"block_ngrams": 1, "min_length": 5},
    "nothing but the end": {"vocabulary": 3},
    "prefix beyond the limit": {"max_length": 3, "prefix": [3, 4, 3, 3, 4]},
    "prefix that repeats": {"block_ngrams": 1, "prefix": [3, 3, 3]},
    "prefix with an end": {"prefix": [3, EOS, 4]},
    "prefix with a beginning": {"prefix": [BOS, 4]},
}


@pytest.mark.parametrize("beam", [1, 2, 7])
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(name: str, beam: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = dict(EXTREMES[name])
    prefix = options.pop("prefix", [])
    models = Models(5, options.pop("vocabulary", 5), [1, 4, 2], count=2)
    case = Case(models, SearchConfig(beam=beam, nbest=beam, **options), [[], prefix, prefix[:1]])
    found = case.by_native()
    check_equal(found, case.by_python(monkeypatch))
    for (best, *_), given in zip(found, case.prefixes or [], strict=True):
        kept = given[: options.get("max_length")]
        assert best.tokens[: len(kept)] == (kept[: kept.index(EOS)] if EOS in kept else kept)


def test_done_targets_leave_at_once() -> None:
    case = Case(Models(7, 9, [1, 2, 3, 4, 5, 6] * 3, ending=1.0), SearchConfig())
    lengths = [len(best.tokens) for (best,) in case.by_native()]
    assert [case.models.stepped[i] for i in range(18)] == [n + 1 for n in lengths]
    assert len(set(lengths)) > 2


@pytest.mark.parametrize("kind", ["greedy", "drawn", "beam"])
@pytest.mark.parametrize("seed", range(10))
def test_a_result_does_not_depend_on_its_block(seed: int, kind: str) -> None:
    """The same bits alone and beside others."""
    case = random_case(3000 + seed, beam=None if kind == "beam" else 1)
    models = replace(case.models, sources=[1, 5, 3, 2, 6, 4, 7, 3], vocabulary=8, cache={})
    config = replace(case.config, sample=kind == "drawn", seed=seed, temperature=0.7)
    case = replace(case, models=models, config=config, prefixes=None)
    whole = case.by_native()
    for block in ([0], [5], [1, 4], [7, 2, 6, 3]):
        for found, expected in zip(case.by_native(block), (whole[i] for i in block), strict=True):
            assert [(h.tokens, h.log_prob, h.score, h.token_log_probs) for h in found] == [
                (h.tokens, h.log_prob, h.score, h.token_log_probs) for h in expected
            ]


def test_among_equals_the_first_wins() -> None:
    """First the lowest beam, then the lowest symbol."""
    models = Models(0, 6, [2], sharpness=0.0, constant=True)
    config = SearchConfig(min_length=2, max_length=2)
    ((best,),) = Case(models, config).by_native()
    assert best.tokens == [3, 3]
    (found,) = Case(models, replace(config, beam=2, nbest=2)).by_native()
    assert [h.tokens for h in found] == [[3, 3], [3, 4]]
    (found,) = Case(models, replace(config, beam=4, nbest=4)).by_native()
    assert [h.tokens for h in found] == [[3, 3], [3, 4], [3, 5], [4, 3]]


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"broken": 0},
        {"broken": 2, "value": math.inf},
        {"ending": -math.inf},
        {"never": 1.0},
        {"vocabulary": 3, "broken": 1, "value": -math.inf},
    ],
    ids=["nan", "inf later", "no end", "all -inf", "only -inf is left"],
)
def test_probabilities_that_rank_nothing_are_an_error(options: dict[str, Any], beam: int) -> None:
    models = Models(**{"seed": 1, "vocabulary": 7, "sources": [3, 2], **options})
    with pytest.raises(native.NotNumbersError):
        Case(models, SearchConfig(beam=beam, max_length=6, min_length=5)).by_native()


@pytest.mark.parametrize("seed", range(4))
def test_nan_beside_finished_hypotheses_is_an_error(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = Models(seed, 7, [3, 2, 3, 4], ending=0.5, broken=2, value=math.nan)
    case = Case(models, SearchConfig(beam=3, max_length=8))
    assert outcome(case.by_native) == "error"
    assert outcome(lambda: case.by_python(monkeypatch)) == "error"


def test_nothing_to_search() -> None:
    assert Case(Models(0, 5, []), SearchConfig()).by_native() == []
    assert Case(Models(0, 5, []), SearchConfig(beam=3)).by_native() == []
