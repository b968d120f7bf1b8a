"""The native search against the search in Python, both over the same made-up models.

The logits and the weights of such a model are random numbers that depend only on the sentence and on
the symbols so far.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import pytest
import torch
from torch import Tensor

from fused_attn.seq2seq.config import SearchConfig
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.search import search as python
from fused_attn.seq2seq.search.hypothesis import Hypothesis
from fused_attn.seq2seq.vocabulary import BOS, EOS, PAD

native = pytest.importorskip("fused_attn._C")

PENALTIES = {"none": 0, "average": 1, "gnmt": 2}
NOT_NUMBERS = "the probabilities of the model are not finite numbers"


@dataclass(frozen=True)
class Models:
    """Made-up models.

    ending: added to the logit of EOS. sharpness: of the logits.
    never: share of the logits that are -inf. broken: a step at which a logit of `value` occurs, in
    the sentences with an odd number.
    """

    seed: int
    vocabulary: int
    sources: Sequence[int]
    count: int = 1
    attends: bool = True
    ending: float = 0.0
    sharpness: float = 2.0
    never: float = 0.0
    broken: int | None = None
    value: float = math.nan
    cache: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False)

    def row(self, sentence: int, history: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Logits (models, V) and weights (S,) after symbols, BOS included."""
        key = sentence, history
        if key not in self.cache:
            self.cache[key] = self._row(sentence, history)
        return self.cache[key]

    def _row(self, sentence: int, history: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        seed = hash((self.seed, sentence, history)) & (2**63 - 1)
        generator = torch.Generator().manual_seed(seed)
        logits = self.sharpness * torch.randn(self.count, self.vocabulary, generator=generator)
        logits[:, EOS] += self.ending
        if self.never:
            shares = torch.rand(logits.shape, generator=generator)
            logits[shares < self.never] = -torch.inf
        if self.broken is not None and len(history) > self.broken and sentence % 2:
            logits[-1, 3] = self.value
        weights = torch.zeros(max(self.sources, default=0))
        size = self.sources[sentence]
        weights[:size] = torch.randn(size, generator=generator).mul(3).softmax(dim=0)
        return logits, weights

    def step(
        self, sentences: Sequence[int], histories: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor]:
        """Logits (models, rows, V) and weights (rows, S)."""
        rows = [self.row(*key) for key in zip(sentences, map(tuple, histories), strict=True)]
        return torch.stack([each[0] for each in rows], 1), torch.stack([each[1] for each in rows])


class Ensemble:
    """What the search in Python asks of an ensemble, for made-up models."""

    def __init__(
        self,
        members: Sequence[Models],
        source: Tensor,
        lengths: Tensor,
        beams: int = 1,
        *,
        return_weights: bool = False,
        graphs: bool = True,
    ) -> None:
        (self.models,) = members
        self.beams, self.return_weights = beams, return_weights
        self.has_attention = self.models.attends
        self.numbers = [row // beams for row in range(len(source) * beams)]
        self.histories: list[list[int]] = [[] for _ in self.numbers]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def step(self, symbols: Tensor) -> tuple[Tensor, Tensor | None]:
        for history, symbol in zip(self.histories, symbols.tolist(), strict=True):
            history.append(symbol)
        logits, weights = self.models.step(self.numbers, self.histories)
        log_probs = torch.log_softmax(logits, dim=-1)
        mean = log_probs[0]
        if len(log_probs) > 1:
            mean = torch.logsumexp(log_probs, dim=0) - math.log(len(log_probs))
        return mean, weights if self.return_weights and self.has_attention else None

    def reorder(self, rows: Tensor) -> None:
        self.histories = [list(self.histories[row]) for row in rows.tolist()]

    def keep(self, sentences: Tensor) -> None:
        rows = [s * self.beams + beam for s in sentences.tolist() for beam in range(self.beams)]
        self.histories = [self.histories[row] for row in rows]
        self.numbers = [self.numbers[row] for row in rows]


@dataclass(frozen=True)
class Case:
    models: Models
    config: SearchConfig
    prefixes: Sequence[Sequence[int]] | None = None
    return_weights: bool = False

    def limits(self) -> list[int]:
        longest = self.config.max_length
        return [2 * n + 10 if longest is None else longest for n in self.models.sources]

    def by_python(self, monkeypatch: pytest.MonkeyPatch) -> list[list[Hypothesis]]:
        monkeypatch.setattr(python, "Ensemble", Ensemble)
        lengths = torch.tensor(self.models.sources)
        prefix = None
        if self.prefixes is not None:
            longest = max(map(len, self.prefixes))
            prefix = torch.tensor([[*p, *[PAD] * (longest - len(p))] for p in self.prefixes])
        return python.search(
            [self.models],  # type: ignore[list-item]
            torch.zeros(len(lengths), int(lengths.max()), dtype=torch.long),
            lengths,
            self.config,
            prefix=prefix,
            return_weights=self.return_weights,
        )

    def by_native(self, sentences: Sequence[int] | None = None) -> list[list[Hypothesis]]:
        """Search some sentences of the case, or all, in one block."""
        models, config = self.models, self.config
        block = range(len(models.sources)) if sentences is None else sentences
        limits = self.limits()
        asked = self.return_weights or config.coverage_penalty > 0

        def step(rows: list[int], histories: list[list[int]]) -> tuple[Any, Any]:
            logits, weights = models.step([block[row] for row in rows], histories)
            return logits.numpy(), weights.numpy() if asked and models.attends else None

        options = {name: getattr(config, name) for name in SearchConfig.__dataclass_fields__}
        options |= {
            "most": config.most,
            "nbest_mass": config.nbest_mass or 0.0,
            "length_penalty": PENALTIES[config.length_penalty],
            "seed": config.seed or 0,
            "return_weights": self.return_weights,
        }
        given: Sequence[Sequence[int]] = self.prefixes or [[]] * len(models.sources)
        found = native.search_with(
            step,
            models.count,
            models.vocabulary,
            config.beam,
            [models.sources[i] for i in block],
            models.attends,
            options,
            [(i, limits[i], list(given[i])) for i in block],
        )
        return [
            [self._hypothesis(*each, models.sources[i]) for each in best]
            for i, best in zip(block, found, strict=True)
        ]

    def _hypothesis(
        self,
        tokens: list[int],
        log_prob: float,
        score: float,
        gains: list[float],
        weights: list[float],
        source: int,
    ) -> Hypothesis:
        aligned = None
        if self.return_weights:
            aligned = torch.tensor(weights).view(-1, source)
        else:
            assert not weights
        return Hypothesis(tokens, log_prob, score, aligned, gains)


def outcome(search: Any) -> list[list[Hypothesis]] | str:
    try:
        return search()
    except (InputError, RuntimeError) as error:
        assert NOT_NUMBERS in str(error)
        return "error"


def check_equal(found: Any, expected: Any) -> None:
    if isinstance(expected, str) or isinstance(found, str):
        assert found == expected
        return
    for ours, theirs in zip(found, expected, strict=True):
        assert [h.tokens for h in ours] == [h.tokens for h in theirs]
        for h, other in zip(ours, theirs, strict=True):
            near = {"rel": 1e-5, "abs": 1e-5}
            assert h.log_prob == pytest.approx(other.log_prob, **near)
            assert h.score == pytest.approx(other.score, **near)
            assert h.token_log_probs == pytest.approx(other.token_log_probs, **near)
            assert (h.weights is None) == (other.weights is None)
            if h.weights is not None:
                assert torch.equal(h.weights, other.weights)


def random_prefix(rng: random.Random, vocabulary: int) -> list[int]:
    symbols = range(3, vocabulary) if vocabulary > 3 else [EOS]
    return [rng.choice(symbols) for _ in range(rng.choice([0, 0, 1, 2, 3, 6]))]


def random_case(seed: int, *, beam: int | None = None, odd: bool = False) -> Case:
    """odd: logits of -inf, nan and inf."""
    rng = random.Random(seed)
    vocabulary = rng.choice([3, 4, 5, 6, 9, 20, 50])
    count = rng.choice([1, 1, 2, 5])
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
    del count
    return Case(models, config, prefixes, return_weights=rng.random() < 0.6)


@pytest.mark.parametrize("seed", range(150))
def test_greedy_search_finds_what_python_finds(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = random_case(seed, beam=1)
    check_equal(outcome(case.by_native), outcome(lambda: case.by_python(monkeypatch)))


@pytest.mark.parametrize("seed", range(250))
def test_beam_search_finds_what_python_finds(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(1000 + seed)
    check_equal(outcome(case.by_native), outcome(lambda: case.by_python(monkeypatch)))


@pytest.mark.parametrize("beam", [1, None], ids=["greedy", "beam"])
@pytest.mark.parametrize("seed", range(100))
def test_the_same_for_logits_that_are_not_finite(
    seed: int, beam: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = random_case(2000 + seed, beam=beam, odd=True)
    check_equal(outcome(case.by_native), outcome(lambda: case.by_python(monkeypatch)))
