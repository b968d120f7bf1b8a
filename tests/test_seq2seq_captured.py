"""Searches with replayed steps find the same targets as eager searches."""

from __future__ import annotations

import copy
import gc
import itertools
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from captured_models import SEARCHES, SHAPES, SIZE, assert_same, draw, make
from recorded import FakeRecorder
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fused_attn.seq2seq.config import SearchConfig
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.search import captured, graphs, step_cache
from fused_attn.seq2seq.search.captured import CapturedStepper
from fused_attn.seq2seq.search.ensemble import STEPS_BEFORE_CAPTURE, Ensemble
from fused_attn.seq2seq.search.search import search
from fused_attn.seq2seq.vocabulary import BOS


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRecorder]:
    fake = FakeRecorder(torch.device("cpu"))
    monkeypatch.setitem(graphs.RECORDERS, "cpu", fake)
    yield fake
    step_cache._CACHES.clear()


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_replays_find_what_steps_find(shape: str, name: str, recorder: FakeRecorder) -> None:
    """Batches of different sizes, one after another, in the same buffers."""
    model, config = make(**SHAPES[shape]), SEARCHES[name]
    for count, longest in ((6, 7), (8, 5), (1, 33), (5, 9)):
        batch = draw(count, longest, seed=count)
        before = recorder.replays
        found = search(model, *batch, config, return_weights=True)
        assert recorder.replays > before
        assert_same(found, search(model, *batch, config, return_weights=True, graphs=False))
    # Two graphs: room for 8 sentences, reused twice, and room for one.
    assert recorder.tries == len(recorder.graphs) == 2


def test_draws(recorder: FakeRecorder) -> None:
    model, config = make(), SearchConfig(sample=True, seed=3, min_length=5, max_length=9)
    for _ in range(2):
        assert_same(search(model, *draw(4), config), search(model, *draw(4), config, graphs=False))
    assert recorder.tries == 1 and recorder.replays > 5


@pytest.mark.parametrize("beam", [1, 3])
def test_an_ensemble(beam: int, recorder: FakeRecorder) -> None:
    models = [make(1), make(2, **SHAPES["all at once"]), make(3, score="none")]
    config = SearchConfig(beam=beam, max_length=12)
    for count in (5, 7):
        found = search(models, *draw(count), config, return_weights=True)
        assert_same(found, search(models, *draw(count), config, return_weights=True, graphs=False))
    assert len(recorder.graphs) == 1
    # With another model in the ensemble, no cached graph may be used.
    models[1] = make(4)
    assert_same(search(models, *draw(5), config), search(models, *draw(5), config, graphs=False))
    assert len(recorder.graphs) == 2 and recorder.graphs[1].replays > 0


@torch.inference_mode()
@pytest.mark.parametrize("beam", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["fed", "all at once", "monotonic"])
def test_the_same_bits_in_the_same_room(
    shape: str, dtype: torch.dtype, beam: int, recorder: FakeRecorder
) -> None:
    """4 sentences of 32 positions. Their beams are reordered, and two sentences leave."""
    recorder.checks, near = False, 1e-5 if dtype == torch.float32 else 0.05
    model, (source, lengths) = make(**SHAPES[shape]).to(dtype), draw(4, 32)
    rows = 4 * beam
    generator = torch.Generator().manual_seed(0)
    arguments = ([model], source, lengths, beam)
    with (
        Ensemble(*arguments, return_weights=True) as one,
        Ensemble(*arguments, return_weights=True, graphs=False) as other,
    ):
        assert one.capture() and one.is_captured and not other.is_captured
        for step in range(6):
            symbols = torch.randint(3, SIZE, (rows,), generator=generator)
            steps = [each.step(symbols) for each in (one, other)]
            for mine, theirs in zip(*steps, strict=True):
                assert mine is not None and theirs is not None
                if rows == 4 * beam:
                    assert torch.equal(mine, theirs)
                torch.testing.assert_close(mine, theirs, rtol=0, atol=near)
            for each in (one, other):
                if beam > 1 and step != 1:
                    parents = torch.arange(rows).view(-1, beam)[:, [1, 1]].flatten()
                    each.reorder(parents)
                    if step == 4:  # a second reordering before the next step
                        each.reorder(torch.arange(rows).flip(0))
                if step == 3:
                    each.keep(torch.tensor([1, 3]))
            if step == 3:
                rows = 2 * beam
                stepper: Any = one._stepper
                (memory,) = stepper._buffers.prepared
                assert memory.memory_lengths.tolist() == [*lengths[[1, 3]].tolist(), 0, 0]
    assert recorder.graphs[0].replays == 6


def test_a_graph_is_made_after_some_steps_and_used_from_the_first(recorder: FakeRecorder) -> None:
    model = make()
    batch = draw(4)
    short = SearchConfig(max_length=STEPS_BEFORE_CAPTURE - 1, min_length=STEPS_BEFORE_CAPTURE - 1)
    search(model, *batch, short)
    assert recorder.tries == 0
    steps = SearchConfig(max_length=9, min_length=9)  # and EOS
    search(model, *batch, steps)
    assert recorder.tries == 1 and recorder.replays == 10 - STEPS_BEFORE_CAPTURE
    search(model, *batch, steps)
    search(model, *batch, short)
    assert recorder.tries == 1
    assert recorder.replays == 20 - STEPS_BEFORE_CAPTURE + STEPS_BEFORE_CAPTURE


def test_room() -> None:
    model = make(score="location", max_source=40)
    counts = [captured.Room.of([], n, 2, 7, True).sentences for n in (1, 2, 3, 8, 9, 200)]
    assert counts == [1, 2, 4, 8, 16, 256]
    positions = [captured.Room.of([], 1, 1, n, True).source for n in (1, 32, 33, 100)]
    assert positions == [32, 32, 64, 128]
    assert [captured.Room.of([model], 1, 1, n, True).source for n in (5, 33, 41)] == [32, 40, 41]


def test_what_is_not_used_goes(recorder: FakeRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_cache, "MOST_STEPS", 2)
    model = make()
    for count in (1, 2, 4):
        search(model, *draw(count))
    cache = step_cache.cache_of(model)
    assert len(cache) == 2 and recorder.tries == 3
    search(model, *draw(2))  # cached; now the one used last
    search(model, *draw(1))
    assert recorder.tries == 4
    search(model, *draw(2))
    assert recorder.tries == 4
    monkeypatch.setattr(step_cache, "MOST_BYTES", 1)
    search(model, *draw(2))
    assert len(cache) == 1


def test_two_searches_at_once_have_graphs_of_their_own(recorder: FakeRecorder) -> None:
    model, batch = make(), draw(4)
    with torch.inference_mode(), Ensemble([model], *batch) as one, Ensemble([model], *batch) as two:
        assert one.capture() and two.capture()
        symbols = torch.full((4,), BOS)
        first = one.step(symbols)[0].clone()
        two.step(symbols)
        two.step(symbols)
        again = two.step(symbols)[0].clone()
        assert not torch.equal(first, again)
        one.step(symbols)
        assert torch.equal(one.step(symbols)[0], again)
    assert recorder.tries == 2 and len(step_cache.cache_of(model)) == 1


def test_a_capture_that_fails(recorder: FakeRecorder, caplog: pytest.LogCaptureFixture) -> None:
    """A layer that synchronizes: capture is tried once, then steps run eagerly."""

    class Waiting(nn.Identity):
        def forward(self, input: Tensor) -> Tensor:
            return input * (1.0 if input.sum().item() < 1e9 else 0.0)

    model, config = make(), SearchConfig(beam=2, max_length=12)
    expected = search(model, *draw(4), config, graphs=False)
    model.output_proj = Waiting().eval()
    with caplog.at_level(logging.DEBUG, logger=step_cache.__name__):
        for _ in range(2):
            assert_same(search(model, *draw(4), config), expected)
            search(model, *draw(9), config)
    assert recorder.tries == 1 and recorder.replays == 0
    (record,) = caplog.records
    assert "not permitted when a stream is capturing" in record.getMessage()


def test_graphs_are_used_in_every_mode_without_gradients(recorder: FakeRecorder) -> None:
    recorder.checks = False
    model, batch = make(input_feeding=True), draw(4)
    expected = search(model, *batch)
    with torch.no_grad(), Ensemble([model], *batch) as ensemble:
        assert ensemble.capture() and recorder.tries == 1
        symbols, found = torch.full((4,), BOS), []
        for _ in range(3):
            symbols = ensemble.step(symbols)[0].argmax(dim=-1)
            found.append(symbols)
    for row, (hypothesis,) in zip(torch.stack(found, dim=1).tolist(), expected, strict=True):
        assert row[: len(hypothesis.tokens)] == hypothesis.tokens[:3]


def test_an_address_that_comes_again(
    recorder: FakeRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new model may get the address of a deleted one."""
    monkeypatch.setattr(step_cache, "_key", lambda models, room: (None, None, room))
    models = [make(1), make(2)]
    search(models, *draw(4))
    (step,) = step_cache.cache_of(models[0])._steps.values()
    assert step.serves(models) and not step.serves(models[:1])
    models[1] = make(3)
    assert not step.serves(models)
    assert_same(search(models, *draw(4)), search(models, *draw(4), graphs=False))
    assert recorder.tries == 2


def test_a_state_of_another_dtype_is_not_captured(recorder: FakeRecorder) -> None:
    """Copying it into the buffers would round it."""

    model = make(input_feeding=True)
    with torch.inference_mode(), Ensemble([model], *draw(2)) as ensemble:
        stepper: Any = ensemble._stepper
        (state,) = stepper.decoders.states
        object.__setattr__(state, "attentional", state.attentional.float())
        assert not ensemble.capture()
    assert recorder.tries == 1


def test_parameters_elsewhere_are_captured_anew(recorder: FakeRecorder) -> None:
    model, batch = make(), draw(4)
    other = make(seed=5)
    search(model, *batch)
    model.load_state_dict(other.state_dict())  # in place
    assert_same(search(model, *batch), search(other, *batch, graphs=False))
    assert recorder.tries == 1
    model.output.weight = nn.Parameter(model.output.weight * 0.5)
    assert_same(search(model, *batch), search(model, *batch, graphs=False))
    assert recorder.tries == 2 and len(step_cache.cache_of(model)) == 1
    model.float()
    search(model, *batch)
    assert recorder.tries == 3 and len(step_cache.cache_of(model)) == 1


def test_options_that_change_are_captured_anew(recorder: FakeRecorder) -> None:
    model, batch = make(**SHAPES["monotonic"]), draw(4)
    search(model, *batch)
    assert model.decoder.attention is not None
    model.decoder.attention.window = 1
    assert_same(search(model, *batch), search(model, *batch, graphs=False))
    assert recorder.tries == 2


def test_nothing_stays_alive(recorder: FakeRecorder) -> None:
    model = make()
    search(model, *draw(4))
    assert len(step_cache.cache_of(model)) == 1
    kept = step_cache.cache_of(model)
    (step,) = kept._steps.values()
    references: list[Callable[[], object]] = [
        weakref.ref(model),
        weakref.ref(step),
        weakref.ref(step._symbols),
    ]
    twin = copy.deepcopy(model)  # graphs are not part of a model
    assert twin not in step_cache._CACHES
    recorder.graphs.clear()
    del model, step, kept
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


def test_a_search_that_fails_leaves_no_graph_behind(
    recorder: FakeRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = make(), draw(4)
    search(model, *batch)
    calls = itertools.count()
    step = CapturedStepper.step

    def failing(self: CapturedStepper, symbols: Tensor) -> Any:
        if next(calls) == 2:
            raise ValueError("the third")
        return step(self, symbols)

    monkeypatch.setattr(CapturedStepper, "step", failing)
    with pytest.raises(ValueError, match="the third"):
        search(model, *batch)
    assert len(step_cache.cache_of(model)) == 0
    assert_same(search(model, *batch), search(model, *batch, graphs=False))


def _hooked(model: Seq2Seq) -> None:
    model.output.register_forward_hook(lambda *call: None)


def _normed(model: Seq2Seq) -> None:
    parametrizations.weight_norm(model.output)


REASONS: dict[str, Callable[[Seq2Seq], object]] = {
    "a model is in training mode": lambda model: model.output.train(),
    "output has hooks": _hooked,
    "output is parametrized": _normed,
    "not on one device": lambda model: model.output.to("meta"),
}


@torch.no_grad()
@pytest.mark.parametrize("reason", REASONS)
def test_why_a_model_is_not_captured(reason: str, recorder: FakeRecorder) -> None:
    model = make()
    assert step_cache.not_captured_reasons([model]) == []
    REASONS[reason](model)
    found = step_cache.not_captured_reasons([make(1), model])
    assert any(reason in each for each in found)


def test_when_a_model_is_not_captured(
    recorder: FakeRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = make()
    assert step_cache.not_captured_reasons([model]) == ["gradients are enabled"]
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert step_cache.not_captured_reasons([model]) == ["autocast is enabled"]
        with FlopCounterMode(display=False):
            found = step_cache.not_captured_reasons([model])
        assert any("dispatch mode" in each for each in found)
        handle = nn.modules.module.register_module_forward_hook(lambda *call: None)
        assert "global module hooks" in step_cache.not_captured_reasons([model])[0]
        handle.remove()
        monkeypatch.delitem(graphs.RECORDERS, "cpu")
        assert (
            "the device type cpu does not support graphs"
            in step_cache.not_captured_reasons([model])[0]
        )
        with Ensemble([model], *draw(2)) as ensemble:
            assert not ensemble.capture()
