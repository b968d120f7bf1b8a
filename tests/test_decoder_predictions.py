"""The search of packed models against the search over the torch models."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from made_up_models import check_equal
from torch import Tensor

from fused_attn.seq2seq.config import ModelConfig, SearchConfig
from fused_attn.seq2seq.data.examples import pad
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.search import packed
from fused_attn.seq2seq.search.constraints import LengthBound, limits_of
from fused_attn.seq2seq.search.search import search
from fused_attn.seq2seq.vocabulary import EOS

pytest.importorskip("fused_attn._C")

SIZE = 12
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "fed": {"input_feeding": True, "layers": 2},
    "coverage": {"score": "concat", "coverage": True},
    "none": {"score": "none", "cell": "gru"},
    "monotonic": {"local": "monotonic", "window": 2},
}
CONFIGS = {
    "greedy": SearchConfig(),
    "greedy constrained": SearchConfig(block_ngrams=2, min_length=6, coverage_penalty=0.3),
    "beam": SearchConfig(beam=4, nbest=4),
    "beam constrained": SearchConfig(
        beam=5, nbest=3, block_ngrams=1, min_length=3, length_penalty="gnmt", coverage_penalty=0.3
    ),
    "likely": SearchConfig(beam=6, nbest_mass=0.5, length_penalty="none"),
}


def make(seed: int, **options: Any) -> Seq2Seq:
    torch.manual_seed(seed)
    model = Seq2Seq(ModelConfig(hidden=20, embedding=8, **options), SIZE, SIZE).eval()
    with torch.no_grad():
        model.output.weight *= 6.0
        model.output.bias[EOS] -= 0.5
    return model


def batch(seed: int) -> tuple[list[list[int]], Tensor]:
    """Sources, and a prefix for each."""
    rng = random.Random(seed)
    sources = [[rng.randrange(3, SIZE) for _ in range(rng.randint(1, 9))] for _ in range(17)]
    prefixes = [[rng.randrange(3, SIZE) for _ in range(rng.randint(0, 3))] for _ in sources]
    return sources, pad(prefixes)[0]


@pytest.mark.parametrize("count", [1, 2], ids=["one", "ensemble with prefixes"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_models_find_what_torch_models_find(shape: str, name: str, count: int) -> None:
    models = [make(seed, **SHAPES[shape]) for seed in range(count)]
    sources, prefix = batch(len(shape))
    source, lengths = pad(sources)
    config = CONFIGS[name]
    forced = prefix if count > 1 else None
    expected = search(models, source, lengths, config, prefix=forced, return_weights=True)
    limits = limits_of(lengths, config, LengthBound())
    found = packed.PackedModels(models).search(source, lengths, limits, config, forced, True)
    check_equal(found, expected, exact_weights=False)


@pytest.mark.parametrize("name", [*CONFIGS, "drawn"])
def test_packed_results_are_the_same_bits_alone_and_on_any_number_of_threads(name: str) -> None:
    config = SearchConfig(sample=True, seed=1) if name == "drawn" else CONFIGS[name]
    models = packed.PackedModels([make(3, **SHAPES["fed"])])
    source, lengths = pad(batch(1)[0])
    limits = limits_of(lengths, config, LengthBound())
    before = torch.get_num_threads()
    every = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            every.append(models.search(source, lengths, limits, config))
    finally:
        torch.set_num_threads(before)
    assert every[0] == every[1] == every[2]
    if name == "drawn":  # a draw depends on the position of its source in the batch
        (first,) = models.search(source[:1], lengths[:1], limits[:1], config)
        assert first == every[0][0]
        return
    for i, expected in enumerate(every[0]):
        alone = slice(i, i + 1)
        trimmed = source[alone, : int(lengths[i])]
        assert models.search(trimmed, lengths[alone], limits[alone], config) == [expected]


@pytest.mark.parametrize("temperature", [1e-30, 1e-46, 5e-324])
def test_packed_draws_with_a_cold_temperature_are_greedy(temperature: float) -> None:
    models = packed.PackedModels([make(4)])
    source, lengths = pad(batch(2)[0])
    limits = limits_of(lengths, SearchConfig(), LengthBound())
    greedy = models.search(source, lengths, limits, SearchConfig())
    cold = replace(SearchConfig(), sample=True, seed=3, temperature=temperature)
    assert models.search(source, lengths, limits, cold) == greedy


@pytest.mark.parametrize("temperature", [1e38, 1e300])
def test_packed_draws_with_a_hot_temperature_are_uniform(temperature: float) -> None:
    models = packed.PackedModels([make(4)])
    source, lengths = pad([[3]] * 2000)
    config = SearchConfig(sample=True, seed=3, temperature=temperature, max_length=1)
    found = models.search(source, lengths, limits_of(lengths, config, LengthBound()), config)
    counts = [0] * SIZE
    for (hypothesis,) in found:
        counts[hypothesis.tokens[0] if hypothesis.tokens else EOS] += 1
    assert counts[:EOS] == [0] * EOS  # neither padding nor the start
    assert all(120 < count < 280 for count in counts[EOS:])  # 2000 / 10, six deviations
