"""Made-up models, over which both the native search and the search in Python run.

The logits and weights of such a model are random numbers that depend only on the sentence and the
symbols so far.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import pytest
import torch
from torch import Tensor

from fused_attn.seq2seq.config import SearchConfig
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.search import search as python
from fused_attn.seq2seq.search.hypothesis import Hypothesis
from fused_attn.seq2seq.vocabulary import EOS, PAD

native = pytest.importorskip("fused_attn._C")

PENALTIES = {"none": 0, "average": 1, "gnmt": 2}


@dataclass(frozen=True)
class Models:
    """Made-up models.

    ending: added to the logit of EOS. sharpness: of the logits.
    never: share of the logits that are -inf.
    broken: from this step on the last logit is `value`, in sentences with an odd number.
    constant: the same in all sentences and steps.
    stepped: counts the rows of each sentence in all steps.
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
    constant: bool = False
    stepped: Counter[int] = field(default_factory=Counter, compare=False)
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
            logits[-1, -1] = self.value
        weights = torch.zeros(max(self.sources, default=0))
        size = self.sources[sentence]
        weights[:size] = torch.randn(size, generator=generator).mul(3).softmax(dim=0)
        return logits, weights

    def step(
        self, sentences: Sequence[int], histories: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor]:
        """Logits (models, rows, V) and weights (rows, S)."""
        self.stepped.update(sentences)
        if self.constant:
            logits, weights = self.row(0, ())
            return logits[:, None].repeat(1, len(sentences), 1), weights.repeat(len(sentences), 1)
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

    def padded(self) -> list[list[int]]:
        """The prefixes, padded to the length of the longest."""
        prefixes = self.prefixes or [[]] * len(self.models.sources)
        longest = max(map(len, prefixes), default=0)
        return [[*prefix, *[PAD] * (longest - len(prefix))] for prefix in prefixes]

    def by_python(self, monkeypatch: pytest.MonkeyPatch) -> list[list[Hypothesis]]:
        monkeypatch.setattr(python, "Ensemble", Ensemble)
        lengths = torch.tensor(self.models.sources)
        prefix = None if self.prefixes is None else torch.tensor(self.padded())
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
        prefixes = self.padded()
        found = native.search_with(
            step,
            models.count,
            models.vocabulary,
            config.beam,
            [models.sources[i] for i in block],
            models.attends,
            options,
            [(i, limits[i], prefixes[i]) for i in block],
        )
        return [
            [self._hypothesis(each, models.sources[i]) for each in best]
            for i, best in zip(block, found, strict=True)
        ]

    def _hypothesis(
        self, found: tuple[list[int], float, float, list[float], list[float]], source: int
    ) -> Hypothesis:
        tokens, log_prob, score, gains, weights = found
        assert self.return_weights or not weights
        aligned = torch.tensor(weights).view(-1, source) if self.return_weights else None
        return Hypothesis(tokens, log_prob, score, aligned, gains)


def outcome(search: Any) -> list[list[Hypothesis]] | str:
    try:
        return search()
    except (InputError, native.NotNumbersError) as error:
        assert "the probabilities of the model are not finite numbers" in str(error)
        return "error"


def near(value: Any) -> Any:
    """Equal except for rounding in float32."""
    return pytest.approx(value, rel=1e-5, abs=1e-5)


def check_equal(found: Any, expected: Any, *, exact_weights: bool = True) -> None:
    if isinstance(expected, str) or isinstance(found, str):
        assert found == expected
        return
    for ours, theirs in zip(found, expected, strict=True):
        assert [h.tokens for h in ours] == [h.tokens for h in theirs]
        for h, other in zip(ours, theirs, strict=True):
            assert h.log_prob == near(other.log_prob)
            assert h.score == near(other.score)
            assert h.token_log_probs == near(other.token_log_probs)
            assert (h.weights is None) == (other.weights is None)
            if h.weights is not None:
                tolerance = 0.0 if exact_weights else 1e-5
                torch.testing.assert_close(h.weights, other.weights, rtol=0.0, atol=tolerance)


def check_against_python(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the results, and that no sentence takes more or fewer steps."""
    found = outcome(case.by_native)
    rows = Counter(case.models.stepped)
    case.models.stepped.clear()
    expected = outcome(lambda: case.by_python(monkeypatch))
    check_equal(found, expected)
    if not isinstance(expected, str):
        assert rows == case.models.stepped
