"""Searches with steps captured as CUDA graphs, on a GPU."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from captured_models import SEARCHES, SHAPES, SIZE, assert_same, draw, make
from torch import Tensor, nn

from fused_attn.seq2seq.config import ModelConfig, SearchConfig, TrainingConfig
from fused_attn.seq2seq.data.examples import Examples
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.search import graphs, step_cache
from fused_attn.seq2seq.search.ensemble import Ensemble
from fused_attn.seq2seq.search.search import search
from fused_attn.seq2seq.training.trainer import Trainer
from fused_attn.seq2seq.vocabulary import BOS

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_replays_on_a_gpu(shape: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    replays = itertools.count()
    replay = graphs.CudaGraph.replay

    def counted(self: graphs.CudaGraph) -> None:
        next(replays)
        replay(self)

    monkeypatch.setattr(graphs.CudaGraph, "replay", counted)
    model, config = make(device="cuda", **SHAPES[shape]), SEARCHES[name]
    for count, longest in ((6, 7), (8, 5), (3, 33)):
        source, lengths = draw(count, longest, seed=count)
        batch = source.cuda(), lengths
        found = search(model, *batch, config, return_weights=True)
        assert_same(found, search(model, *batch, config, return_weights=True, graphs=False))
    assert next(replays) > 10
    assert step_cache.cache_of(model)._failed is None


@needs_gpu
@torch.inference_mode()
@pytest.mark.filterwarnings("ignore:RNN module weights")  # torch does not flatten those in bfloat16
@pytest.mark.parametrize("beam", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_bits_on_a_gpu(shape: str, dtype: torch.dtype, beam: int) -> None:
    model = make(device="cuda", **SHAPES[shape]).to(dtype)
    source, lengths = draw(4, 32)
    arguments = ([model], source.cuda(), lengths, beam)
    with Ensemble(*arguments) as one, Ensemble(*arguments, graphs=False) as other:
        assert one.capture(), step_cache.cache_of(model)._failed
        symbols = torch.full((4 * beam,), BOS, device="cuda")
        for _ in range(6):
            mine, theirs = (each.step(symbols)[0] for each in (one, other))
            assert torch.equal(mine, theirs)
            symbols = mine.argmax(dim=-1)
            for each in (one, other):
                each.reorder(torch.arange(4 * beam, device="cuda").view(-1, beam).flip(1).flatten())


@needs_gpu
@pytest.mark.parametrize("bridge", ["last", "mean"])
@pytest.mark.parametrize("reverse", [False, True])
def test_lengths_may_be_on_either_side(reverse: bool, bridge: str) -> None:
    model = make(device="cuda", reverse_source=reverse, bridge=bridge)
    source, lengths = draw(5)
    assert_same(search(model, source.cuda(), lengths), search(model, source.cuda(), lengths.cuda()))
    expected = search(make(reverse_source=reverse, bridge=bridge), source, lengths)
    assert_same(search(model, source.cuda(), lengths), expected)


@needs_gpu
def test_a_training_step_waits_once_for_the_gpu() -> None:
    model = Seq2Seq(ModelConfig(hidden=16, embedding=8), SIZE, SIZE).cuda()
    source, _ = draw(64, 6)
    sources = [
        row[:6].tolist() for row in source.clamp(min=3)
    ]  # of equal length: nothing is packed
    trainer = Trainer(model, Examples.of(sources, sources), TrainingConfig(batch_size=32, epochs=3))
    trainer.run_epoch(
        lambda report: None, lambda: False
    )  # compiles and loads kernels, chooses algorithms
    trainer.finish_epoch()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.run_epoch(lambda report: None, lambda: False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [each for each in caught if "synchroniz" in str(each.message)]
    assert len(waits) == trainer.batches_per_epoch == 2, [str(each.message) for each in waits]


@needs_gpu
def test_a_capture_that_fails_on_a_gpu() -> None:
    """It leaves no trace: random numbers, allocation and captures work as before."""

    class Waiting(nn.Identity):
        def forward(self, input: Tensor) -> Tensor:
            return input * (1.0 if input.sum().item() < 1e9 else 0.0)

    model, config = make(device="cuda"), SearchConfig(beam=2, max_length=12)
    source, lengths = draw(4)
    expected = search(model, source.cuda(), lengths, config, graphs=False)
    model.output_proj = Waiting().eval()
    assert_same(search(model, source.cuda(), lengths, config), expected)
    assert step_cache.cache_of(model)._failed is not None
    assert torch.rand(1000, device="cuda").unique().numel() > 900
    other = make(device="cuda")
    assert_same(search(other, source.cuda(), lengths, config), expected)
    assert step_cache.cache_of(other)._failed is None and len(step_cache.cache_of(other)) == 1
