"""A decoder step as a device graph, captured once and replayed for all steps and batches.

The graph works on its own buffers for symbols, states, memories and lengths. They are a little
larger than a batch, so that one graph serves many batches. Unused rows are sentences of length 0,
and unused positions lie beyond the lengths, so nothing reads them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fused_attn.prepared import PreparedMemory
from fused_attn.seq2seq.model.decoder import DecoderState
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.search.graphs import Recorder
from fused_attn.seq2seq.search.stepping import Decoders, joint_step, rows_of

# The memory is padded to a multiple of this many positions.
_POSITIONS = 32


@dataclass(frozen=True)
class Room:
    """The capacity of a captured step."""

    sentences: int
    beams: int
    source: int  # positions of the memory
    return_weights: bool

    @classmethod
    def of(
        cls,
        models: Sequence[Seq2Seq],
        sentences: int,
        beams: int,
        source: int,
        return_weights: bool,
    ) -> Room:
        """Return the room for a batch.

        The number of sentences is rounded up to a power of two, ``source`` to a multiple of 32.
        """
        longest = -(-source // _POSITIONS) * _POSITIONS
        for model in models:  # the location score has a largest source length
            if model.config.max_source is not None and model.config.score == "location":
                longest = min(longest, max(source, model.config.max_source))
        return cls(1 << max(0, sentences - 1).bit_length(), beams, longest, return_weights)


class CapturedStepper:
    """A `Stepper` that replays a graph.

    It holds only weak references to its models; the caller keeps them alive.

    models: in evaluation mode.
    decoders: of any batch; only their dtypes, devices and widths matter.
    room: capacity; no later batch may need more.
    recorder: captures the graph.

    Raises RuntimeError if the step cannot be captured.
    """

    def __init__(
        self, models: Sequence[Seq2Seq], decoders: Decoders, room: Room, recorder: Recorder
    ) -> None:
        self.room = room
        self._models = [weakref.ref(model) for model in models]
        rows = room.sentences * room.beams
        device = decoders.states[0].hidden[0].device
        with torch.inference_mode(False):  # so that the buffers may be written in any mode
            self._buffers = Decoders(
                [_state_buffer(state, rows, room.source) for state in decoders.states],
                [_memory_buffer(memory, room) for memory in decoders.prepared],
                room.beams,
                room.return_weights,
            )
            self._symbols = torch.zeros(rows, dtype=torch.int64, device=device)
            self._in_order = torch.arange(rows, device=device)
            self._parents = self._in_order.clone()  # the row whose state each row continues
        self._is_in_order = True  # whether every row continues itself
        self._sentences = self._source = 0  # sizes of the current batch
        self._graph = recorder.capture(self._work)
        self.replays = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers and outputs."""
        tensors = [*self._graph.outputs, *(tensor for _, tensor in self._states())]
        tensors += [t for memory in self._buffers.prepared for t in _tensors(memory)]
        return sum(tensor.nbytes for tensor in tensors)

    def serves(self, models: Sequence[Seq2Seq]) -> bool:
        """Whether this step was captured from these models."""
        mine = [reference() for reference in self._models]
        return len(mine) == len(models) and all(a is b for a, b in zip(mine, models, strict=True))

    def load(self, decoders: Decoders) -> None:
        """Copy the state of ``decoders`` into the buffers; the batch must fit into ``room``."""
        for buffer, state in zip(self._buffers.states, decoders.states, strict=True):
            _fill_state(buffer, state)
        for memory, prepared in zip(self._buffers.prepared, decoders.prepared, strict=True):
            if memory is not None and prepared is not None:
                _fill_memory(memory, prepared)
        beams = self.room.beams
        self._sentences = decoders.states[0].hidden[0].shape[1] // beams
        self._source = max(
            (p.memory.shape[1] for p in decoders.prepared if p is not None), default=0
        )
        self._put_in_order()

    def step(self, symbols: Tensor) -> tuple[Tensor, Tensor | None]:
        rows = len(symbols)
        self._symbols[:rows].copy_(symbols)
        self._graph.replay()
        self.replays += 1
        self._put_in_order()
        log_probs, *aligned = self._graph.outputs
        # The next step overwrites both. A search keeps the weights, so they are copied.
        weights = aligned[0][:rows, : self._source].clone() if aligned else None
        return log_probs[:rows], weights

    def reorder(self, rows: Tensor) -> None:
        if self.room.beams == 1:
            self._select(rows)
            return
        # The graph itself gathers the parents' states at the start of the next step.
        chosen = rows if self._is_in_order else self._parents.index_select(0, rows)
        self._parents[: len(rows)].copy_(chosen)
        self._is_in_order = False

    def keep(self, sentences: Tensor) -> None:
        rows = rows_of(sentences, self.room.beams)
        self._select(rows if self._is_in_order else self._parents.index_select(0, rows))
        self._put_in_order()
        count = len(sentences)
        for memory in self._buffers.prepared:
            for tensor in _tensors(memory):
                tensor[:count].copy_(tensor.index_select(0, sentences))
            if memory is not None and memory.memory_lengths is not None:
                memory.memory_lengths[count:] = 0
        self._sentences = count

    def _select(self, rows: Tensor) -> None:
        for dim, tensor in self._states():
            tensor.narrow(dim, 0, len(rows)).copy_(tensor.index_select(dim, rows))

    def _put_in_order(self) -> None:
        if not self._is_in_order:
            self._parents.copy_(self._in_order)
            self._is_in_order = True

    def _states(self) -> Iterator[tuple[int, Tensor]]:
        """The state tensors, each with its row dimension."""
        for state in self._buffers.states:
            yield from ((1, tensor) for tensor in state.hidden)
            yield from ((0, t) for t in (state.attentional, state.coverage) if t is not None)

    def _work(self) -> tuple[Tensor, ...]:
        """The captured work: compute the outputs and write the next states into the buffers.

        The parents' states are gathered into new tensors before any buffer is overwritten.
        """
        models = [model for reference in self._models if (model := reference()) is not None]
        assert len(models) == len(self._models)
        decoders = self._buffers
        if self.room.beams > 1:
            states = [state.index_select(self._parents) for state in decoders.states]
            decoders = replace(decoders, states=states)
        log_probs, states, weights = joint_step(models, decoders, self._symbols)
        for buffer, state in zip(self._buffers.states, states, strict=True):
            _store(buffer, state)
        return (log_probs,) if weights is None else (log_probs, weights)


def _state_buffer(state: DecoderState, rows: int, source: int) -> DecoderState:
    device = state.hidden[0].device
    hidden = tuple(
        torch.zeros(len(t), rows, t.shape[2], dtype=t.dtype, device=device) for t in state.hidden
    )
    feed, seen = state.attentional, state.coverage
    return DecoderState(
        hidden,
        None if feed is None else torch.zeros(rows, feed.shape[1], dtype=feed.dtype, device=device),
        None if seen is None else torch.zeros(rows, source, dtype=seen.dtype, device=device),
        torch.zeros((), dtype=torch.int64, device=device),
    )


def _memory_buffer(memory: PreparedMemory | None, room: Room) -> PreparedMemory | None:
    """Zeros for a memory with lengths and without a mask, as `Seq2Seq.prepare_memory` returns."""
    if memory is None:
        return None
    if memory.memory_lengths is None or memory.memory_mask is not None:
        raise RuntimeError("a captured step needs a memory with lengths and without a mask")

    def room_for(tensor: Tensor) -> Tensor:
        shape = (room.sentences, room.source, *tensor.shape[2:])[: tensor.dim()]
        return torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)

    buffer = pytree.tree_map(room_for, memory)
    assert isinstance(buffer, PreparedMemory)
    return buffer


def _fill_state(buffer: DecoderState, state: DecoderState) -> None:
    rows = state.hidden[0].shape[1]
    for mine, tensor in zip(buffer.hidden, state.hidden, strict=True):
        mine[:, :rows].copy_(tensor)
    if buffer.attentional is not None and state.attentional is not None:
        buffer.attentional[:rows].copy_(state.attentional)
    if buffer.coverage is not None and state.coverage is not None:
        buffer.coverage[:rows, : state.coverage.shape[1]].copy_(state.coverage)
    assert isinstance(buffer.position, Tensor)
    if isinstance(state.position, Tensor):
        buffer.position.copy_(state.position)
    else:
        buffer.position.fill_(state.position)


def _fill_memory(buffer: PreparedMemory, memory: PreparedMemory) -> None:
    batch, source = memory.memory.shape[:2]
    for mine, tensor in zip(_tensors(buffer), _tensors(memory), strict=True):
        part = mine[:batch] if tensor.dim() == 1 else mine[:batch, :source]
        part.copy_(tensor)
    assert buffer.memory_lengths is not None
    buffer.memory_lengths[batch:] = 0


def _store(buffer: DecoderState, state: DecoderState) -> None:
    """Copy a state into a buffer; raises RuntimeError if their dtypes differ."""
    pairs = [
        *zip(buffer.hidden, state.hidden, strict=True),
        (buffer.attentional, state.attentional),
        (buffer.coverage, state.coverage),
    ]
    for mine, tensor in pairs:
        if mine is None or tensor is None:
            continue
        if mine.dtype != tensor.dtype:
            raise RuntimeError(
                f"the step changed the dtype of a state from {mine.dtype} to {tensor.dtype}"
            )
        mine.copy_(tensor)
    assert isinstance(buffer.position, Tensor) and isinstance(state.position, Tensor)
    buffer.position.copy_(state.position)


def _tensors(memory: PreparedMemory | None) -> list[Tensor]:
    return [] if memory is None else pytree.tree_leaves(memory)
