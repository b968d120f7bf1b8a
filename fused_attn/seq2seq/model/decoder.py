"""The decoder: recurrent layers, attention over the memory, and the attentional state.

Luong, Pham & Manning 2015, "Effective Approaches to Attention-based Neural Machine Translation",
sections 2 and 3. Without input feeding or coverage no decoder state depends on earlier attention,
so a training batch takes one call of the recurrent layers and one of the attention for all steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from fused_attn.attention import LuongAttention
from fused_attn.prepared import PreparedMemory
from fused_attn.seq2seq.config import ModelConfig
from fused_attn.seq2seq.model.recurrent import Hidden, Stack


@dataclass(frozen=True)
class DecoderState:
    """The state between two steps, for N rows: sentences, or the beams of each in turn."""

    hidden: Hidden  # of the recurrent layers, each (layers, N, hidden)
    attentional: Tensor | None = None  # (N, hidden), h~ of the last step, with input feeding
    coverage: Tensor | None = None  # (N, S), sum of the weights so far, with coverage
    position: int | Tensor = 0  # number of steps done; int64 () in a captured step

    def index_select(self, rows: Tensor) -> Self:
        """Return the state of ``rows``, int64 (M,). A row may repeat, as when beams branch."""

        def chosen(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.index_select(0, rows)

        return replace(
            self,
            hidden=tuple(tensor.index_select(1, rows) for tensor in self.hidden),
            attentional=chosen(self.attentional),
            coverage=chosen(self.coverage),
        )


class Decoder(nn.Module):
    """Recurrent layers followed by attention.

    Args:
        config: shape of the model.
        stack: the recurrent layers. Their input is the embedding, concatenated with h~ of the last
            step with input feeding.
        memory_dim: width of the memory.
        backend: backend of the attention, "auto" or a name.
    """

    def __init__(
        self, config: ModelConfig, stack: Stack, memory_dim: int, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.stack = stack
        self.input_feeding = config.input_feeding
        self.attention: LuongAttention | None = None
        if config.score != "none":
            self.attention = LuongAttention(
                config.hidden,
                memory_dim,
                config.score,
                attn_dim=config.attn_dim,
                output_dim=config.hidden,
                local=config.local,
                window=config.window,
                coverage=config.coverage,
                max_source=config.max_source,
                backend=backend,
            )
        self.covers = config.coverage

    @property
    def is_stepwise(self) -> bool:
        """Whether a step depends on the attention of the step before it."""
        return self.input_feeding or self.covers

    def start(self, hidden: Hidden, source: int) -> DecoderState:
        """Return the state before the first step.

        hidden: from the bridge. source: number of memory positions S.
        """
        rows = hidden[0].shape[1]
        feed = hidden[0].new_zeros(rows, self.stack.hidden) if self.input_feeding else None
        coverage = hidden[0].new_zeros(rows, source) if self.covers else None
        return DecoderState(hidden, feed, coverage)

    def forward(
        self,
        embedded: Tensor,
        state: DecoderState,
        memory: Tensor | PreparedMemory | None,
        lengths: Tensor | None = None,
        *,
        return_weights: bool = False,
    ) -> tuple[Tensor, DecoderState, Tensor | None]:
        """Run T steps over given symbols.

        embedded: (N, T, embedding), the embedded input symbols.
        memory, lengths: as `LuongAttention` takes them. If T is 1, their batch size may be N / K:
            the K beams of a sentence share its memory, without a copy.

        Returns the attentional states (N, T, hidden), the next state, and the alignment weights
        (N, T, S), or None if not asked for.
        """
        if not self.is_stepwise or embedded.shape[1] == 1:
            return self._run(embedded, state, memory, lengths, return_weights)
        states, alignments = [], []
        for t in range(embedded.shape[1]):
            step = self._run(embedded[:, t : t + 1], state, memory, lengths, return_weights)
            attentional, state, weights = step
            states.append(attentional)
            if weights is not None:
                alignments.append(weights)
        together = torch.cat(alignments, dim=1) if alignments else None
        return torch.cat(states, dim=1), state, together

    def _run(
        self,
        embedded: Tensor,
        state: DecoderState,
        memory: Tensor | PreparedMemory | None,
        lengths: Tensor | None,
        return_weights: bool,
    ) -> tuple[Tensor, DecoderState, Tensor | None]:
        """Run all steps at once, or a single step if the decoder `is_stepwise`."""
        if state.attentional is not None:
            embedded = torch.cat((embedded, state.attentional[:, None]), dim=-1)
        outputs, hidden = self.stack(embedded, state.hidden)
        assert isinstance(outputs, Tensor)
        weights: Tensor | None = None
        if self.attention is not None:
            assert memory is not None
            wanted = return_weights or self.covers
            outputs, weights = self._attend(self.attention, outputs, state, memory, lengths, wanted)
        after = replace(state, hidden=hidden, position=state.position + embedded.shape[1])
        if self.input_feeding:
            after = replace(after, attentional=outputs[:, 0])
        if state.coverage is not None and weights is not None:
            after = replace(after, coverage=state.coverage + weights[:, 0])
        return outputs, after, weights

    @staticmethod
    def _attend(
        attention: LuongAttention,
        query: Tensor,
        state: DecoderState,
        memory: Tensor | PreparedMemory,
        lengths: Tensor | None,
        return_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        rows, steps, width = query.shape
        batch = len(memory) if isinstance(memory, PreparedMemory) else memory.shape[0]
        beams = rows // batch if steps == 1 and batch else 1
        positions: Tensor | None = None
        if attention.local == "monotonic":
            positions = torch.arange(steps, device=query.device) + state.position
        coverage = None if state.coverage is None else state.coverage[:, None]
        if beams > 1:  # (N, 1, D) -> (B, K, D): the beams of a sentence become its queries
            query = query.view(batch, beams, width)
            positions = positions if positions is None else positions[0].expand(batch, beams)
            coverage = coverage if coverage is None else coverage.view(batch, beams, -1)
        found, weights = attention(
            query,
            memory,
            lengths,
            positions=positions,
            coverage=coverage,
            return_weights=return_weights,
        )
        if beams > 1:
            found = found.reshape(rows, 1, -1)
            weights = None if weights is None else weights.reshape(rows, 1, -1)
        return found, weights
