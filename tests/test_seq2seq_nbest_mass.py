"""`nbest_mass`: as many targets as a share of the probability needs, against all targets."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from small_models import checkpoint, predictor

from fused_attn.cli import main
from fused_attn.seq2seq.config import SearchConfig
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.inference.predictor import Predictor
from fused_attn.seq2seq.search.search import search
from fused_attn.seq2seq.vocabulary import BOS, EOS

WORDS = ("x", "y", "z")
LONGEST = 4
EVERY = 1 + 3 + 9 + 27 + 81  # targets of at most four words
SOURCES = ["abc", "d", "ébda"]
PENALTIES = ["none", "average", "gnmt"]


def model() -> Predictor:
    found = predictor(words=WORDS, sharpness=5.0, ending=3.0)
    found.models[0].double()
    return found


@torch.no_grad()
def every_target(found: Predictor, source: str) -> list[tuple[tuple[str, ...], float]]:
    """All targets of at most four words with their log probabilities in float64."""
    ids = torch.tensor([found.source.encode(source)])
    lengths = torch.tensor([len(source)])
    targets = []
    for size in range(LONGEST + 1):
        for words in itertools.product(WORDS, repeat=size):
            symbols = [*found.target.encode(words), EOS]
            logits, _ = found.models[0](ids, lengths, torch.tensor([[BOS, *symbols[:-1]]]))
            scores = torch.log_softmax(logits[0], dim=-1)
            total = sum(float(scores[step, symbol]) for step, symbol in enumerate(symbols))
            targets.append((words, total))
    return targets


def divisor(penalty: str, count: int) -> float:
    """What a log probability of ``count`` symbols is divided by; EOS counts."""
    return {"none": 1.0, "average": count, "gnmt": ((5 + count) / 6) ** 0.6}[penalty]


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("source", SOURCES)
def test_the_mass_is_that_of_all_targets(source: str, penalty: str) -> None:
    """With a beam of all targets nothing is pruned."""
    found = model()
    every = every_target(found, source)
    every.sort(key=lambda each: -each[1] / divisor(penalty, len(each[0]) + 1))
    masses = list(itertools.accumulate(math.exp(total) for _, total in every))
    counts = set()
    for share in (0.01, 0.2, 0.5, 0.9 * masses[-1], 0.99 * masses[-1]):
        needed = next(i for i, mass in enumerate(masses, start=1) if mass >= share)
        counts.add(needed)
        config = SearchConfig(
            beam=128, nbest_mass=share, max_length=LONGEST, length_penalty=penalty
        )
        (best,) = found.predict([source], config)
        got = best.alternatives
        assert [each.tokens for each in got] == [words for words, _ in every[:needed]]
        assert [each.score for each in got] == pytest.approx([t for _, t in every[:needed]])
        assert sum(math.exp(each.score) for each in got) >= share
        assert sum(math.exp(each.score) for each in got[:-1]) < share
        capped = SearchConfig(
            beam=128, nbest=3, nbest_mass=share, max_length=LONGEST, length_penalty=penalty
        )
        (best,) = found.predict([source], capped)
        assert len(best.alternatives) == min(3, needed)
    assert len(counts) > 2


def test_all_of_the_beam_is_returned_for_the_whole_mass() -> None:
    """More than the mass of the targets that end: as many as the beam has."""
    found = model()
    config = SearchConfig(beam=128, nbest_mass=1.0, max_length=LONGEST)
    assert [len(each.alternatives) for each in found.predict(SOURCES, config)] == [121, 121, 121]
    config = SearchConfig(beam=4, nbest_mass=1.0, max_length=LONGEST)
    assert [len(each.alternatives) for each in found.predict(SOURCES, config)] == [4, 4, 4]


@pytest.mark.parametrize("value", [0, -0.1, 1.1, math.nan, True, "0.9"])
def test_shares_that_are_none(value: object) -> None:
    with pytest.raises(ValueError, match="nbest_mass must be above 0 and at most 1"):
        SearchConfig(nbest_mass=value)  # type: ignore[arg-type]


def test_a_search_returns_at_most_so_many() -> None:
    assert SearchConfig(beam=5).most == 1
    assert SearchConfig(beam=5, nbest=3).most == 3
    assert SearchConfig(beam=5, nbest_mass=0.5).most == 5
    assert SearchConfig(beam=5, nbest=3, nbest_mass=0.5).most == 3
    found = model()
    ids = torch.tensor([found.source.encode("abc")])
    (hypotheses,) = search(
        found.models, ids, torch.tensor([3]), SearchConfig(beam=6, nbest_mass=1.0)
    )
    assert len(hypotheses) == 6


def test_from_python_it_needs_a_beam() -> None:
    found = predictor()
    assert len(found("abc", beam=4, nbest_mass=1.0).alternatives) == 4
    with pytest.raises(InputError, match="nbest_mass needs beam above 1"):
        found("abc", nbest_mass=0.5)


def test_from_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = str(checkpoint(tmp_path / "model", ending=3.0))
    options = ["--beam", "6", "--nbest-mass", "0.65"]
    found = predictor(ending=3.0)(SOURCES, beam=6, nbest_mass=0.65)
    expected = [each.alternatives for each in found]
    assert len({len(each) for each in expected}) > 1
    assert main(["predict", path, *SOURCES, *options]) == 0
    lines = capfd.readouterr().out.split("\n")
    assert lines == [
        *(text for each in expected for text in ([p.text for p in each] + [""] * 6)[:6]),
        "",
    ]
    assert main(["predict", path, *SOURCES, *options, "--format", "json"]) == 0
    records = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [[each["target"] for each in record["targets"]] for record in records] == [
        [each.text for each in alternatives] for alternatives in expected
    ]
