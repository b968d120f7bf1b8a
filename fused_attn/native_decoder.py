"""Run a `LuongDecoder` with all its steps in one call of the native module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_attn import decoder_spec, packed, routes
from fused_attn.checks import check_lengths
from fused_attn.decoder_parts import DecoderOutput, DecoderState, GreedyOutput
from fused_attn.prepared import PreparedMemory


def not_native_reasons(decoder: Any) -> list[str]:
    """Return why a decoder does not run natively, in short phrases; empty if it does."""
    return _reasons_of_now(decoder) or decoder_spec.not_described(decoder)


def _reasons_of_now(decoder: Any) -> list[str]:
    """The reasons that do not lie in the modules."""
    if routes.is_watched():
        return ["tensor operations are transformed, traced or watched"]
    return packed.reasons_of_now(decoder.backend)


def is_left_to_torch(decoder: Any) -> bool:
    """Whether a call runs in torch for a reason that does not lie in the modules."""
    return torch.compiler.is_compiling() or bool(_reasons_of_now(decoder))


def native_of(decoder: Any, known: NativeDecoder | None) -> NativeDecoder | None:
    """Return the packed decoder, None if it cannot be packed. known: from an earlier call."""
    if known is not None and known.is_of(decoder):
        return known
    return None if decoder_spec.not_described(decoder) else NativeDecoder(decoder)


class NativeDecoder:
    """The packed parameters of a `LuongDecoder`: an immutable copy."""

    def __init__(self, decoder: Any) -> None:
        native = packed.native_module()
        spec = {**decoder_spec.spec(decoder), "compute": decoder.compute, "encoder": None}
        self._model = native.PackedModel(spec)
        self._are_plain = native.are_plain
        self._snapshot = packed.Snapshot(decoder)
        self._kind = _kind(decoder)

    def is_of(self, decoder: Any) -> bool:
        """Whether the decoder has not changed since it was packed."""
        is_same = self._snapshot.module is decoder and self._kind == _kind(decoder)
        return is_same and self._snapshot.is_current()

    @property
    def takes_embedded(self) -> bool:
        """Whether `forward` takes embedded inputs. With a table of the symbols it does not."""
        return bool(self._model.takes_embedded)

    def takes(self, decoder: Any, *given: Tensor | None) -> bool:
        """Whether a call with these tensors may run natively: nothing needs a gradient.

        None stands for a tensor that is not given. The tensors must be float32 or int64, on the
        CPU, and nothing but tensors: no subclass, no trace.
        """
        if not self._are_plain(*given):
            return False
        if not torch.is_grad_enabled():
            return True
        tensors = [tensor for tensor in given if tensor is not None]
        return not any(tensor.requires_grad for tensor in (*tensors, *decoder.parameters()))

    def forward(
        self, inputs: Tensor, memory: Any, lengths: Tensor | None, state: Any, return_weights: bool
    ) -> tuple[DecoderOutput, DecoderState]:
        """`LuongDecoder.forward` for checked arguments."""
        states, lengths = _memory(memory, lengths)
        threads = torch.get_num_threads()
        inputs = inputs if inputs.is_floating_point() else inputs.to(torch.int64)
        found = self._model.run_steps(
            inputs, states, lengths, _given(state), return_weights, threads
        )
        attentional, logits, weights, hidden, cell, fed, coverage = found
        position = state.position + inputs.shape[1]
        hiddens = (hidden,) if cell is None else (hidden, cell)
        after = DecoderState(hiddens, fed, coverage, None, position)
        return DecoderOutput(attentional, logits, weights), after

    def greedy(
        self,
        memory: Any,
        lengths: Tensor | None,
        state: DecoderState,
        limits: tuple[int, int, int],
        return_weights: bool,
    ) -> GreedyOutput:
        """`LuongDecoder.greedy` for checked arguments. ``limits`` are bos, eos and max_length."""
        states, lengths = _memory(memory, lengths)
        rows = torch.empty(state.hidden[0].shape[1], dtype=torch.int64, device="cpu")
        options = (*limits, return_weights, torch.get_num_threads())
        return GreedyOutput(*self._model.greedy(rows, states, lengths, _given(state), *options))


def _memory(memory: Any, lengths: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if isinstance(memory, PreparedMemory):
        memory, lengths = memory.memory, memory.memory_lengths
    if memory is not None and lengths is not None:
        lengths = check_lengths(lengths, memory)
    return memory, None if lengths is None else lengths.to(torch.int64)


def _given(state: DecoderState) -> tuple[Any, ...]:
    hidden, *cell = state.hidden
    return hidden, cell[0] if cell else None, state.attentional, state.coverage, state.position


def _kind(decoder: Any) -> tuple[Any, ...]:
    """What the packed decoder depends on besides its parameters."""
    stack = decoder.recurrent
    rates = (decoder.dropout, decoder.input_dropout)
    options = (stack.cell, stack.residual, decoder.input_feeding, decoder.training, *rates)
    return decoder.backend, decoder.compute, *options
