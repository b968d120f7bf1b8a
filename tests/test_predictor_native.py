"""A `Predictor` whose searches run natively: its copies, and changes of its model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from fused_attn.seq2seq.config import ModelConfig
from fused_attn.seq2seq.inference.predictor import Predictor
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.vocabulary import EOS, Vocabulary

pytest.importorskip("fused_attn._C")

TEXTS = ["a b c", "d", "e f g h", "b b a c d e", "h g f"]


def make(backend: str = "auto") -> Predictor:
    symbols = Vocabulary(list("abcdefgh"))
    size = len(symbols)
    torch.manual_seed(0)
    model = Seq2Seq(ModelConfig(hidden=20, embedding=8, dropout=0.0), size, size).eval()
    model.backend = backend
    with torch.no_grad():
        model.output.weight.mul_(6.0)
        model.output.bias[EOS] -= 0.5
    return Predictor(model, symbols, symbols)


def check(predictor: Predictor) -> None:
    """Compare with a search of the same model in torch."""
    oracle = make("eager")
    (model,) = predictor.models
    oracle.models[0].load_state_dict(model.state_dict())
    attention, given = oracle.models[0].decoder.attention, model.decoder.attention
    assert attention is not None and given is not None
    attention.scale = given.scale
    assert not predictor.not_native_reasons() and oracle.not_native_reasons()
    for found, wanted in zip(predictor(TEXTS), oracle(TEXTS), strict=True):
        assert found.tokens == wanted.tokens
        assert found.score == pytest.approx(wanted.score, abs=1e-4)


def test_copies_can_be_made_after_a_search() -> None:
    predictor = make()
    expected = predictor(TEXTS)
    for other in (copy.deepcopy(predictor), pickle.loads(pickle.dumps(predictor))):
        assert other(TEXTS) == expected
        with torch.no_grad():
            other.models[0].output.weight.mul_(-1.0)
        check(other)
    check(predictor)


def test_an_option_of_the_attention_is_seen() -> None:
    predictor = make()
    predictor(TEXTS)
    attention = predictor.models[0].decoder.attention
    assert attention is not None
    attention.scale = 40.0
    check(predictor)


def test_a_step_of_a_fused_optimizer_is_seen() -> None:
    predictor = make()
    predictor(TEXTS)
    (model,) = predictor.models
    optimizer = torch.optim.Adam(model.parameters(), lr=0.2, fused=True)
    source = torch.tensor([[4, 5, 6]])
    logits, _ = model(source, torch.tensor([3]), torch.tensor([[1, 5, 6]]))
    logits.square().sum().backward()
    optimizer.step()
    check(predictor)


def test_seeds_are_those_that_torch_takes() -> None:
    predictor = make()
    drawn = [predictor(TEXTS, sample=True, seed=seed) for seed in (-1, -1, 2**63)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_autocast_keeps_searches_in_torch() -> None:
    predictor = make()
    predictor(TEXTS)
    assert predictor.compute == "float32"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert predictor.not_native_reasons() == ["autocast is on"]
        assert predictor._engine.packed_models() is None
    check(predictor)
