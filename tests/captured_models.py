"""Small models, sources and comparisons for the tests of captured steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn.seq2seq.config import ModelConfig, SearchConfig
from fused_attn.seq2seq.data.examples import pad
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.search.hypothesis import Hypothesis
from fused_attn.seq2seq.vocabulary import EOS

SIZE = 9
SHAPES: dict[str, dict[str, Any]] = {
    "general": {},
    "dot": {"score": "dot"},
    "concat": {"score": "concat", "cell": "gru"},
    "location": {"score": "location", "max_source": 40},
    "none": {"score": "none"},
    "fed": {"input_feeding": True, "layers": 2, "residual": True},
    "coverage": {"score": "concat", "coverage": True, "cell": "rnn"},
    "all at once": {"score": "concat", "coverage": True, "input_feeding": True, "tie": "output"},
    "monotonic": {"local": "monotonic", "window": 2},
    "predictive": {"local": "predictive", "window": 2, "cell": "gru", "input_feeding": True},
}
SEARCHES = {
    "greedy": SearchConfig(min_length=5, max_length=9, coverage_penalty=0.4, block_ngrams=2),
    "beam": SearchConfig(beam=3, nbest=2, min_length=5, max_length=9, coverage_penalty=0.2),
}


def make(seed: int = 0, device: str = "cpu", **options: Any) -> Seq2Seq:
    torch.manual_seed(seed)
    model = Seq2Seq(ModelConfig(hidden=8, embedding=5, **options), SIZE, SIZE).double().eval()
    with torch.no_grad():
        model.output.weight *= 3.0
        model.output.bias[EOS] -= 1.0
    return model.to(device)


def draw(count: int, longest: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    lengths[0] = longest
    return pad([torch.randint(3, SIZE, (n,), generator=generator).tolist() for n in lengths])


def assert_same(found: list[list[Hypothesis]], expected: list[list[Hypothesis]]) -> None:
    for some, others in zip(found, expected, strict=True):
        assert [h.tokens for h in some] == [h.tokens for h in others]
        for one, other in zip(some, others, strict=True):
            assert one.log_prob == pytest.approx(other.log_prob, rel=1e-9)
            assert one.score == pytest.approx(other.score, rel=1e-9)
            torch.testing.assert_close(one.weights, other.weights)
