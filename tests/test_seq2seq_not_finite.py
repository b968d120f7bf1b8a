"""Searches with models whose probabilities are not numbers end at once with one error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fused_attn.seq2seq.config import ModelConfig, SearchConfig
from fused_attn.seq2seq.data.pairs import Item
from fused_attn.seq2seq.devices import LOOK_EVERY
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.inference.evaluate import perplexity
from fused_attn.seq2seq.inference.predictor import Predictor
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.search.constraints import LengthBound
from fused_attn.seq2seq.vocabulary import EOS, Vocabulary

SEARCHES = {
    "greedy": SearchConfig(),
    "greedy, no doubles": SearchConfig(block_ngrams=1, min_length=2),
    "beam": SearchConfig(beam=3, nbest=2),
    "beam, gnmt": SearchConfig(beam=3, length_penalty="gnmt", coverage_penalty=0.2, min_length=3),
    "beam, no doubles": SearchConfig(beam=2, block_ngrams=1, min_length=5),
    "sample": SearchConfig(sample=True, seed=1),
    "sample, sharp": SearchConfig(sample=True, top_k=2, top_p=0.7, temperature=0.5, seed=1),
}
SYMBOLS = ["a", "b", "c"]


def make(seed: int = 0, hidden: int = 8) -> Seq2Seq:
    torch.manual_seed(seed)
    return Seq2Seq(ModelConfig(hidden=hidden, embedding=6), 6, 6).eval()


def predictor(*models: Seq2Seq, longest: int = 0) -> Predictor:
    vocabulary = Vocabulary(SYMBOLS)
    return Predictor(models, vocabulary, vocabulary, LengthBound(longest=longest))


def spoil(name: str, value: float) -> Callable[[Seq2Seq], None]:
    def change(model: Seq2Seq) -> None:
        with torch.no_grad():
            dict(model.named_parameters())[name].view(-1)[-1] = value

    return change


def never_ends(model: Seq2Seq) -> None:
    """The end of a target has a probability of exactly 0."""
    with torch.no_grad():
        model.output.bias[EOS] = -torch.finfo(torch.float32).max
        model.output.bias[3:] = torch.finfo(torch.float32).max


SPOILED = {
    "nan in the output": spoil("output.weight", math.nan),
    "nan in one symbol": spoil("output.bias", math.nan),
    "inf in one symbol": spoil("output.bias", math.inf),
    "nan in the encoder": spoil("encoder.stack.layers.0.weight_ih_l0", math.nan),
    "nan in the decoder": spoil("decoder.stack.layers.0.bias_hh_l0", math.nan),
    "nan in the attention": spoil("decoder.attention.query_proj.weight", math.nan),
    "no end": never_ends,
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", SPOILED)
@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("look_every", [1, 4])  # as on a CPU, as on a GPU
def test_a_model_without_numbers_is_an_error(
    name: str, kind: str, look_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOOK_EVERY, "cpu", look_every)
    model = make()
    SPOILED[kind](model)
    inputs = [list("abc"), list("a"), list("cab" * 4)]
    for models in ([model], [make(1), model]):
        if kind == "no end" and len(models) > 1:
            continue  # the other model ends
        with pytest.raises(InputError, match="probabilities of the model are not finite numbers"):
            predictor(*models).predict(inputs, SEARCHES[name])


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["greedy", "beam", "sample"])
def test_prefixes_and_long_limits_do_not_hide_it(name: str) -> None:
    model = make()
    SPOILED["nan in one symbol"](model)
    with pytest.raises(InputError, match="not finite numbers"):
        predictor(model, longest=300).predict(["a b"], SEARCHES[name], prefixes=[["b", "c"]])


def test_overflow_in_the_activations_is_an_error() -> None:
    model = make(hidden=7)
    with torch.no_grad():
        model.decoder.attention.output_proj.weight *= (
            1e4  # all of h~ is 1 or -1, and their sum is odd
        )
        for symbol, sign in ((3, 1.0), (4, -1.0)):
            model.output.weight[symbol], model.output.bias[symbol] = sign * 3e38, 3e38
    assert all(p.isfinite().all() for p in model.parameters())
    for config in SEARCHES.values():
        with pytest.raises(InputError, match="not finite numbers"):
            predictor(model).predict(["a b c a b c"], config)


@pytest.mark.parametrize("config", [SearchConfig(), SearchConfig(beam=4)])
def test_one_bad_sentence_among_good_ones_is_noticed(config: SearchConfig) -> None:
    """A nan that only one source meets: in the embedding of its symbol."""
    model = make()
    with torch.no_grad():
        model.source_embedding.weight[5] = math.nan
    good = predictor(model).predict(["a", "a b"], config)
    assert all(math.isfinite(found.score) for found in good)
    with pytest.raises(InputError, match="not finite numbers"):
        predictor(model).predict(["a", "a c", "a b"], config)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", SEARCHES)
def test_a_target_without_a_symbol_left_ends(name: str) -> None:
    """Three symbols, none of which may come twice, and a minimum length of eight."""
    config = replace(SEARCHES[name], block_ngrams=1, min_length=8)
    for found in predictor(make()).predict(["a b c", "b"], config):
        assert len(found.tokens) == len(set(found.tokens)) <= 3
        assert math.isfinite(found.score)
    # Only two of them fit before the first pair would repeat.
    assert any(len(found.tokens) for found in predictor(make()).predict(["a b c"], config))


@pytest.mark.parametrize("scale", [math.nan, 1e4, 3e38])
def test_a_perplexity_beyond_all_numbers_is_an_error(scale: float) -> None:
    """A mean loss of more than 710 nats."""
    model = make()
    with torch.no_grad():
        model.output.bias[EOS] = scale
    with pytest.raises(InputError, match="not finite numbers"):
        perplexity(predictor(model), [Item(("a",), (("b", "c"),))])
