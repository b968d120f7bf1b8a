"""The steps of a `LuongDecoder` in torch, without its embedding and its output layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout

from fused_attn.attention import LuongAttention
from fused_attn.decoder_parts import DecoderState

# The attentional states (N, T, H), the weights (N, T, S) or None, and the state after the steps.
Results = tuple[Tensor, Tensor | None, DecoderState]


@dataclass(frozen=True)
class Source:
    """What the steps of a call attend to."""

    memory: Any
    memory_lengths: Tensor | None
    return_weights: bool


def run(decoder: Any, embedded: Tensor, state: DecoderState, source: Source) -> Results:
    """Run T steps of a decoder: all at once, unless a step depends on the one before it.

    embedded: (N, T, input_size). state: checked and complete.
    """
    if not decoder.is_stepwise or embedded.shape[1] == 1:
        return _at_once(decoder, embedded, state, source)
    states, alignments = [], []
    for t in range(embedded.shape[1]):
        attentional, weights, state = _at_once(decoder, embedded[:, t : t + 1], state, source)
        states.append(attentional)
        if weights is not None:
            alignments.append(weights)
    if not states:
        return _nothing(decoder, embedded, state, source)
    return torch.cat(states, 1), torch.cat(alignments, 1) if alignments else None, state


def _nothing(decoder: Any, embedded: Tensor, state: DecoderState, source: Source) -> Results:
    """The results of no steps at all."""
    rows = embedded.shape[0]
    weights = None
    if source.return_weights and decoder.attention is not None:
        weights = embedded.new_zeros(rows, 0, source.memory.memory.shape[1])
    return embedded.new_zeros(rows, 0, decoder.output_dim), weights, state


def _at_once(decoder: Any, embedded: Tensor, state: DecoderState, source: Source) -> Results:
    """Run all steps at once, or a single step of a decoder that `is_stepwise`."""
    if state.attentional is not None:
        embedded = torch.cat((embedded, state.attentional[:, None]), dim=-1)
    attentional, hidden = decoder.recurrent(embedded, state.hidden)
    weights: Tensor | None = None
    if decoder.attention is not None:
        attentional, weights = _attend(decoder.attention, attentional, state, source)
    if decoder.training and decoder.dropout:
        attentional = dropout(attentional, decoder.dropout)
    after = state._replace(hidden=hidden, position=state.position + embedded.shape[1])
    if decoder.input_feeding:
        after = after._replace(attentional=attentional[:, 0])
    if state.coverage is not None and weights is not None:
        after = after._replace(coverage=state.coverage + weights[:, 0])
    if state.previous_weights is not None and weights is not None:
        after = after._replace(previous_weights=weights[:, 0])
    return attentional, weights if source.return_weights else None, after


def _attend(
    attention: LuongAttention, query: Tensor, state: DecoderState, source: Source
) -> tuple[Tensor, Tensor | None]:
    positions: Tensor | None = None
    if attention.local == "monotonic":
        positions = torch.arange(query.shape[1], device=query.device) + state.position
    coverage, last = (
        None if tensor is None else tensor[:, None]
        for tensor in (state.coverage, state.previous_weights)
    )
    attentional, weights = attention(
        query,
        source.memory,
        source.memory_lengths,
        positions=positions,
        coverage=coverage,
        previous_weights=last,
        return_weights=source.return_weights or attention.history is not None,
    )
    return attentional, weights
