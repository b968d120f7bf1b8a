"""Searches against exhaustive search, and against a slow, plain beam search."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn.seq2seq.config import ModelConfig, SearchConfig
from fused_attn.seq2seq.data.examples import pad
from fused_attn.seq2seq.devices import LOOK_EVERY
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.inference.predictor import Predictor
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.search.beam import beam_search
from fused_attn.seq2seq.search.ensemble import Ensemble
from fused_attn.seq2seq.search.search import search
from fused_attn.seq2seq.search.stepping import EagerStepper
from fused_attn.seq2seq.vocabulary import BOS, EOS, Vocabulary

SIZE = 6  # of the vocabulary: three target symbols, 3, 4 and 5
SYMBOLS = (3, 4, 5)
LONGEST = 4
SOURCES = [[3, 4, 5], [5], [4, 4, 3, 5, 3]]
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "fed": {"input_feeding": True, "layers": 2},
    "coverage": {"score": "concat", "coverage": True},
    "none": {"score": "none"},
    "monotonic": {"local": "monotonic", "window": 2},
}


def make(seed: int = 0, sharpness: float = 4.0, **options: Any) -> Seq2Seq:
    torch.manual_seed(seed)
    model = Seq2Seq(ModelConfig(hidden=9, embedding=5, **options), SIZE, SIZE).double().eval()
    with torch.no_grad():
        model.output.weight *= sharpness
        model.output.bias[EOS] -= 0.5
    return model


@torch.no_grad()
def scored_all(
    models: list[Seq2Seq], source: list[int], targets: list[tuple[int, ...]]
) -> list[tuple[float, Tensor | None]]:
    """Log probabilities of targets, EOS included, and alignments, by one teacher-forced call."""
    inputs, _ = pad([[BOS, *target] for target in targets])
    sources = torch.tensor([source] * len(targets))
    lengths = torch.full((len(targets),), len(source))
    probabilities, alignments = [], []
    for model in models:
        logits, weights = model(sources, lengths, inputs, return_weights=True)
        probabilities.append(torch.softmax(logits, dim=-1))
        if weights is not None:
            alignments.append(weights)
    mean = torch.stack(probabilities).mean(dim=0).log()
    aligned = torch.stack(alignments).mean(dim=0) if alignments else None
    found = []
    for row, target in enumerate(targets):
        total = sum(float(mean[row, t, symbol]) for t, symbol in enumerate((*target, EOS)))
        found.append((total, None if aligned is None else aligned[row, : len(target) + 1]))
    return found


def scored(
    models: list[Seq2Seq], source: list[int], target: tuple[int, ...]
) -> tuple[float, Tensor | None]:
    return scored_all(models, source, [target])[0]


def penalised(total: float, length: int, alignment: Tensor | None, config: SearchConfig) -> float:
    """Score by Wu et al. 2016, eq. 14, or by the mean; ``length`` counts EOS."""
    if config.length_penalty == "average":
        total /= length
    elif config.length_penalty == "gnmt":
        total /= ((5 + length) / 6) ** config.alpha
    if config.coverage_penalty and alignment is not None:
        covered = alignment.sum(dim=0).clamp(1e-6, 1.0)
        total += config.coverage_penalty * float(covered.log().sum())
    return total


def is_allowed(target: tuple[int, ...], config: SearchConfig, prefix: tuple[int, ...]) -> bool:
    if target[: len(prefix)] != prefix or len(target) < config.min_length:
        return False
    size = config.block_ngrams
    grams = [target[i : i + size] for i in range(len(target) - size + 1)] if size else []
    return len(set(grams)) == len(grams)


def all_targets(
    models: list[Seq2Seq], source: list[int], config: SearchConfig, prefix: tuple[int, ...] = ()
) -> list[tuple[float, tuple[int, ...], float]]:
    """Every allowed target with score and log probability, best first."""
    assert config.max_length is not None
    lengths = range(config.max_length + 1)
    every = [t for length in lengths for t in itertools.product(SYMBOLS, repeat=length)]
    targets = [target for target in every if is_allowed(target, config, prefix)]
    found = []
    for target, (total, alignment) in zip(
        targets, scored_all(models, source, targets), strict=True
    ):
        score = penalised(total, len(target) + 1, alignment, config)
        found.append((score, target, total))
    return sorted(found, reverse=True)


CONFIGS = {
    "log-probability": SearchConfig(length_penalty="none"),
    "average": SearchConfig(),
    "gnmt": SearchConfig(length_penalty="gnmt", alpha=0.9),
    "coverage": SearchConfig(length_penalty="gnmt", coverage_penalty=0.4),
    "longer": SearchConfig(min_length=3),
    "no doubles": SearchConfig(length_penalty="gnmt", block_ngrams=1),
    "no pairs twice": SearchConfig(block_ngrams=2, min_length=2),
}


def given(config: SearchConfig, **changes: Any) -> SearchConfig:
    fields = {name: getattr(config, name) for name in config.__dataclass_fields__}
    return SearchConfig(**fields | {"max_length": LONGEST} | changes)


@pytest.mark.parametrize("prefix", [(), (4, 3)], ids=["", "prefix"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_beam_of_all_targets_finds_the_best(
    shape: str, name: str, prefix: tuple[int, ...]
) -> None:
    """Nothing is pruned if there are more beams than targets: 1 + 3 + 9 + 27 + 81."""
    model = make(**SHAPES[shape])
    config = given(CONFIGS[name], beam=128, nbest=6)
    forced = torch.tensor([prefix] * len(SOURCES)) if prefix else None
    found = search(model, *pad(SOURCES), config, prefix=forced, return_weights=True)
    for source, hypotheses in zip(SOURCES, found, strict=True):
        expected = all_targets([model], source, config, prefix)[:6]
        assert [tuple(h.tokens) for h in hypotheses] == [target for _, target, _ in expected]
        for got, (score, target, total) in zip(hypotheses, expected, strict=True):
            assert got.log_prob == pytest.approx(total)
            assert got.score == pytest.approx(score)
            _, alignment = scored([model], source, target)
            assert got.weights is not None
            if alignment is not None:
                torch.testing.assert_close(got.weights, alignment[:-1], check_dtype=False)


@torch.no_grad()
def slow_beam(
    models: list[Seq2Seq], source: list[int], config: SearchConfig
) -> list[tuple[tuple[int, ...], float]]:
    """The same beam search with a list of targets, recomputing all probabilities in every step."""
    assert config.max_length is not None
    alive: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    ended: list[tuple[float, tuple[int, ...]]] = []
    while alive and len(ended) < config.beam:
        extensions = []
        for total, target in alive:
            step = []
            for model in models:
                inputs = torch.tensor([[BOS, *target]])
                logits, _ = model(torch.tensor([source]), torch.tensor([len(source)]), inputs)
                step.append(torch.softmax(logits[0, -1], dim=-1))
            mean = torch.stack(step).mean(dim=0).log().tolist()
            symbols = (EOS,) if len(target) == config.max_length else (EOS, *SYMBOLS)
            extensions += [(total + mean[s], target, s) for s in symbols]
        extensions.sort(reverse=True)
        best = extensions[: 2 * config.beam]
        for total, target, symbol in best[: config.beam]:
            if symbol == EOS:
                ended.append((penalised(total, len(target) + 1, None, config), target))
        alive = [(total, (*target, s)) for total, target, s in best if s != EOS][: config.beam]
    ended.sort(reverse=True)
    return [(target, score) for score, target in ended[: config.nbest]]


@pytest.mark.parametrize("penalty", ["none", "average", "gnmt"])
@pytest.mark.parametrize("beam", [2, 3, 5])
@pytest.mark.parametrize("shape", ["plain", "fed"])
def test_a_narrow_beam_prunes_as_written_out(shape: str, beam: int, penalty: str) -> None:
    model = make(seed=beam, sharpness=2.0, **SHAPES[shape])
    config = SearchConfig(beam=beam, nbest=2, length_penalty=penalty, max_length=9)
    found = search(model, *pad(SOURCES), config)
    for source, hypotheses in zip(SOURCES, found, strict=True):
        expected = slow_beam([model], source, config)
        assert [tuple(h.tokens) for h in hypotheses] == [target for target, _ in expected]
        assert [h.score for h in hypotheses] == pytest.approx([score for _, score in expected])


@pytest.mark.parametrize("beam", [1, 2, 128])
def test_an_ensemble_decides_by_the_mean_probability(beam: int) -> None:
    models = [make(seed=1), make(seed=2, **SHAPES["fed"]), make(seed=3, score="none")]
    config = given(SearchConfig(), beam=beam, nbest=min(beam, 3))
    found = search(models, *pad(SOURCES), config)
    for source, hypotheses in zip(SOURCES, found, strict=True):
        for h in hypotheses:
            assert h.log_prob == pytest.approx(scored(models, source, tuple(h.tokens))[0])
        if beam == 2:
            expected = [target for target, _ in slow_beam(models, source, config)]
        elif beam == 128:
            expected = [target for _, target, _ in all_targets(models, source, config)[:3]]
        else:
            continue
        assert [tuple(h.tokens) for h in hypotheses] == expected


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_beam_of_one_is_greedy(shape: str, name: str) -> None:
    model = make(**SHAPES[shape])
    config = given(CONFIGS[name], max_length=12)
    source, lengths = pad(SOURCES)
    greedy = search(model, source, lengths, config, return_weights=True)
    with torch.inference_mode():
        ensemble = Ensemble([model], source, lengths, return_weights=True)
        limits = lengths.new_full((len(lengths),), 12)
        beamed = beam_search(ensemble, source, lengths, limits, (12, 12), config, None, True)
    for (one,), (other,) in zip(greedy, beamed, strict=True):
        assert one.tokens == other.tokens
        assert (one.log_prob, one.score) == pytest.approx((other.log_prob, other.score))
        torch.testing.assert_close(one.weights, other.weights)


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_result_does_not_depend_on_the_batch(shape: str, beam: int) -> None:
    model = make(**SHAPES[shape])
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(1, 8, (25,), generator=generator).tolist()
    sources = [torch.randint(3, SIZE, (n,), generator=generator).tolist() for n in counts]
    config = SearchConfig(beam=beam, nbest=beam)
    together = search(model, *pad(sources), config)
    for source, hypotheses in zip(sources, together, strict=True):
        (alone,) = search(model, *pad([source]), config)
        assert [h.tokens for h in hypotheses] == [h.tokens for h in alone]
        assert [h.score for h in hypotheses] == pytest.approx([h.score for h in alone])


@pytest.mark.parametrize("beam", [1, 4])
def test_what_is_done_leaves_and_the_memory_is_not_repeated(
    beam: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    rows, memories = [], []
    step = EagerStepper.step

    def watched(self: EagerStepper, symbols: Tensor) -> Any:
        rows.append(len(symbols))
        (memory,) = self.decoders.prepared
        assert memory is not None
        memories.append(len(memory))
        return step(self, symbols)

    monkeypatch.setattr(EagerStepper, "step", watched)
    sources = [[3], [4, 5, 3, 3, 4, 5, 5], [5, 3], [4, 4, 4, 4]] * 5
    search(model, *pad(sources), SearchConfig(beam=beam))
    assert rows[0] == 20 * beam and rows == sorted(rows, reverse=True) and len(set(rows)) > 2
    assert memories == [count // beam for count in rows]


@pytest.mark.parametrize(
    "config",
    [
        SearchConfig(beam=3, nbest=3),
        SearchConfig(coverage_penalty=0.4),
        SearchConfig(block_ngrams=1),
        # After all symbols and EOS nothing is left to sample in a done row.
        SearchConfig(sample=True, top_k=1, block_ngrams=1, min_length=3),
    ],
    ids=["beam", "greedy", "no doubles", "drawn"],
)
def test_looking_seldom_changes_nothing(
    config: SearchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the host does not wait in every step, so sentences leave a little later."""
    model = make()
    expected = search(model, *pad(SOURCES), config, return_weights=True)
    monkeypatch.setitem(LOOK_EVERY, "cpu", 5)
    found = search(model, *pad(SOURCES), config, return_weights=True)
    for one, other in zip(expected, found, strict=True):
        assert [(h.tokens, h.log_prob, h.score) for h in one] == [
            (h.tokens, h.log_prob, h.score) for h in other
        ]
        for h, g in zip(one, other, strict=True):
            torch.testing.assert_close(h.weights, g.weights)


@pytest.mark.parametrize("beam", [1, 2])
def test_a_prefix_beyond_the_limit_of_another_source(beam: int) -> None:
    """At most 12 symbols for a source of 1; of the 20 for a source of 5, 15 are given."""
    given_symbols = [3, 4, 5] * 5
    prefix, _ = pad([[], given_symbols])
    config = SearchConfig(beam=beam, min_length=30)  # no target ends before its limit
    short, long = search(make(), *pad([[3], [3, 4, 5, 4, 3]]), config, prefix=prefix)
    assert len(short[0].tokens) == 12 and len(long[0].tokens) == 20
    assert long[0].tokens[:15] == given_symbols


@pytest.mark.parametrize("beam", [1, 2])
def test_a_prefix_that_cannot_be_is_an_error(beam: int) -> None:
    """It is not replaced by padding."""
    model = make()
    with torch.no_grad():
        model.output.bias[4] = -torch.inf
    with pytest.raises(InputError, match="not finite numbers"):
        search(model, *pad([[3, 5]]), SearchConfig(beam=beam), prefix=torch.tensor([[3, 4]]))


def test_fewer_targets_than_asked_for() -> None:
    config = SearchConfig(beam=8, nbest=8, max_length=1)
    (found,) = search(make(), *pad([[3, 4]]), config)
    assert len(found) == 4 and {tuple(h.tokens) for h in found} == {(), (3,), (4,), (5,)}
    assert sum(math.exp(h.log_prob) for h in found) < 1.0


def test_draws_follow_the_probabilities() -> None:
    """First symbols of many samples against the softmax, with temperature, top-k and top-p."""
    model = make(sharpness=2.0)
    source, lengths = pad([[3, 4, 5]] * 4000)
    with torch.no_grad():
        logits, _ = model(source[:1], lengths[:1], torch.tensor([[BOS]]))
    for options in ({}, {"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.6}):
        config = SearchConfig(sample=True, seed=5, max_length=3, **options)
        drawn = Counter((h.tokens or [EOS])[0] for (h,) in search(model, source, lengths, config))
        scores = logits[0, 0].clone() / options.get("temperature", 1.0)
        scores[:2] = -torch.inf  # PAD and BOS are never sampled
        wanted = torch.softmax(scores, dim=-1)
        ranked = wanted.argsort(descending=True).tolist()
        kept, mass = [], 0.0
        for rank, symbol in enumerate(ranked):
            if rank < options.get("top_k", SIZE) and mass < options.get("top_p", 1.0):
                kept.append(symbol)
            mass += float(wanted[symbol])
        wanted = wanted / wanted[kept].sum()
        assert set(drawn) <= set(kept)
        for symbol in kept:
            spread = 4 * math.sqrt(float(wanted[symbol]) / 4000)
            assert drawn[symbol] / 4000 == pytest.approx(float(wanted[symbol]), abs=spread + 1e-9)


def test_a_seed_repeats_the_draw() -> None:
    model = make(sharpness=1.0)
    batch = pad(SOURCES * 4)
    config = SearchConfig(sample=True, seed=5)
    one, same = (search(model, *batch, config) for _ in range(2))
    assert [h.tokens for (h,) in one] == [h.tokens for (h,) in same]
    other = search(model, *batch, SearchConfig(sample=True, seed=6))
    assert [h.tokens for (h,) in one] != [h.tokens for (h,) in other]
    assert [h.tokens for (h,) in search(model, *batch, SearchConfig(sample=True, top_k=1))] == [
        h.tokens for (h,) in search(model, *batch)
    ]
    for source, (h,) in zip(SOURCES, one, strict=False):
        assert h.log_prob == pytest.approx(scored([model], source, tuple(h.tokens))[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam": 0}, "beam must be a positive whole number, got 0"),
        ({"beam": 2, "nbest": 3}, "nbest must be at most beam = 2, got 3"),
        ({"length_penalty": "wu"}, "length_penalty must be one of none, average, gnmt, got 'wu'"),
        ({"alpha": -1.0}, "alpha must be a number of at least 0, got -1.0"),
        ({"temperature": 0.0}, "temperature must be a positive number, got 0.0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"alpha": "x"}, "alpha must be a number of at least 0, got 'x'"),
        ({"temperature": "hot"}, "temperature must be a positive number, got 'hot'"),
        ({"top_p": None}, "top_p must be above 0 and at most 1, got None"),
        ({"sample": "yes"}, "sample must be True or False, got 'yes'"),
        ({"seed": 1.5}, r"seed must be a whole number in -2\*\*63..2\*\*64-1 or None, got 1.5"),
        ({"seed": 2**64}, "seed must be a whole number .* got 18446744073709551616"),
        ({"seed": True}, "seed must be a whole number .* got True"),
        ({"sample": True, "beam": 2}, "sample goes with beam = 1, got beam = 2"),
        ({"min_length": 3, "max_length": 2}, "min_length must be at most max_length = 2, got 3"),
        ({"block_ngrams": -1}, "block_ngrams must be a whole number of at least 0, got -1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchConfig(**options)


def test_predictions_in_the_order_of_the_sources() -> None:
    """Sources of different lengths, each with its own prefix; scores fall."""
    letters = Vocabulary("abc")
    predictor = Predictor([make()], letters, letters)
    sources, prefixes = [tuple("abcab"), ("c",), ("b", "a")], ["cb", "", "a"]
    config = SearchConfig(beam=3, nbest=2)
    found = predictor.predict(sources, config, prefixes=prefixes, alignments=True)
    for source, prefix, best in zip(sources, prefixes, found, strict=True):
        first, second = best.alternatives
        assert first is best and first.ranking_score >= second.ranking_score
        for prediction in best.alternatives:
            assert prediction.source == source
            assert "".join(prediction.tokens).startswith(prefix)
            assert prediction.alignment is not None
            assert prediction.alignment.shape == (len(prediction.tokens), len(source))
    with pytest.raises(InputError, match="unknown symbol 'x'; known symbols: a b c"):
        predictor.predict([("a", "x", "b")])
    assert predictor.predict([]) == []
