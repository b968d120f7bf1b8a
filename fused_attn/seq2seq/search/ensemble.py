"""One or several models that decode a batch of sources together."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from fused_attn.seq2seq.devices import moved
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.search.captured import CapturedStepper, Room
from fused_attn.seq2seq.search.step_cache import StepCache, cache_of, not_captured_reasons
from fused_attn.seq2seq.search.stepping import Decoders, EagerStepper

# A capture takes about as long as this many eager steps (an estimate, not measured on a GPU). A
# search captures after that many steps. If it ends right then, it took at most twice as long.
STEPS_BEFORE_CAPTURE = 4


class Ensemble:
    """The decoders of one or several models on a batch of sources; a `Stepper`.

    Probabilities and alignment weights are means over the models. Use it as a context manager: it
    owns its captured step, if it has one, until the end of the context.

    models: in evaluation mode, on one device, with the same vocabularies.
    source: int64 (B, S), padded at the end. lengths: int64 (B,), 1..S, on any device.
    beams: rows per sentence.
    return_weights: whether `step` returns alignment weights, if any model has attention.
    graphs: whether to replay a graph of the step if the device supports that: from the first step
        if one was captured before, else after `STEPS_BEFORE_CAPTURE` steps.
    """

    def __init__(
        self,
        models: Sequence[Seq2Seq],
        source: Tensor,
        lengths: Tensor,
        beams: int = 1,
        *,
        return_weights: bool = False,
        graphs: bool = True,
    ) -> None:
        self._models = models
        decoders = Decoders([], [], beams, return_weights)
        on_device = moved(lengths, source.device)
        for model in models:
            memory, state = model.encode(source, lengths)
            if beams > 1:
                sentences = torch.arange(len(source), device=source.device)
                state = state.index_select(sentences.repeat_interleave(beams))
            decoders.states.append(state)
            decoders.prepared.append(model.prepare_memory(memory, on_device))
        self.has_attention = any(memory is not None for memory in decoders.prepared)
        self._stepper: EagerStepper | CapturedStepper = EagerStepper(models, decoders)
        self._room = Room.of(models, len(source), beams, source.shape[1], return_weights)
        self._cache: StepCache | None = None
        if graphs and len(source) and not not_captured_reasons(models):
            self._cache = cache_of(models[0])
        self._steps = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        stepper, cache, self._cache = self._stepper, self._cache, None
        if isinstance(stepper, CapturedStepper) and cache is not None and error is None:
            cache.give_back(self._models, stepper)

    @property
    def is_captured(self) -> bool:
        """Whether the next step is a replay."""
        return isinstance(self._stepper, CapturedStepper)

    def capture(self) -> bool:
        """Replay a graph from the next step on; returns False if that is not possible."""
        if not self._take() and self._cache is not None:
            assert isinstance(self._stepper, EagerStepper)
            decoders = self._stepper.decoders
            self._use(self._cache.capture(self._models, decoders, self._room))
        return self.is_captured

    def step(self, symbols: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Stepper`."""
        if self._cache is not None:
            if self._steps == 0:
                self._take()
            elif self._steps == STEPS_BEFORE_CAPTURE:
                self.capture()
        self._steps += 1
        return self._stepper.step(symbols)

    def reorder(self, rows: Tensor) -> None:
        """See `Stepper`."""
        self._stepper.reorder(rows)

    def keep(self, sentences: Tensor) -> None:
        """See `Stepper`."""
        self._stepper.keep(sentences)

    def _take(self) -> bool:
        """Use a cached graph if there is one; returns whether a graph is in use now."""
        if not self.is_captured and self._cache is not None:
            self._use(self._cache.take(self._models, self._room))
        return self.is_captured

    def _use(self, captured: CapturedStepper | None) -> None:
        if captured is not None:
            assert isinstance(self._stepper, EagerStepper)
            captured.load(self._stepper.decoders)
            self._stepper = captured
