"""The model: RNN encoder, Luong attention, RNN decoder.

Luong, Pham & Manning 2015, "Effective Approaches to Attention-based Neural Machine Translation",
sections 2 and 3.1, without input feeding: no decoder state depends on an alignment, so that all
target steps of a training batch go through one call of the decoder and one of the attention.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fused_attn.attention import LuongAttention
from fused_attn.prepared import PreparedMemory
from fused_attn.seq2seq.config import ModelConfig
from fused_attn.seq2seq.vocabulary import PAD

# Of every layer: (h,) of a GRU, (h, c) of an LSTM, each (layers, B, hidden).
State = tuple[Tensor, ...]

_CELLS = {"lstm": nn.LSTM, "gru": nn.GRU}


class Seq2Seq(nn.Module):
    """Encoder, attention and decoder over symbol numbers.

    Args:
        config: the shape.
        source_size, target_size: sizes of the vocabularies, special symbols included.
        backend: of the attention, "auto" or a name.
    """

    def __init__(
        self, config: ModelConfig, source_size: int, target_size: int, *, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden
        directions = 2 if config.bidirectional else 1
        cell = _CELLS[config.cell]
        between = config.dropout if config.layers > 1 else 0.0
        self.source_embedding = nn.Embedding(source_size, config.embedding, padding_idx=PAD)
        self.target_embedding = nn.Embedding(target_size, config.embedding, padding_idx=PAD)
        self.encoder = cell(
            config.embedding, hidden, config.layers,
            batch_first=True, dropout=between, bidirectional=config.bidirectional,
        )  # fmt: skip
        self.decoder = cell(
            config.embedding, hidden, config.layers, batch_first=True, dropout=between
        )
        # One for h and, in an LSTM, one for c; the layers share it.
        self.bridge = nn.ModuleList(
            nn.Linear(directions * hidden, hidden) for _ in range(2 if config.cell == "lstm" else 1)
        )
        # The dot score compares h_t with h_s as they are, so they must be equally wide.
        narrow = config.score == "dot" and config.bidirectional
        self.memory_proj = nn.Linear(2 * hidden, hidden, bias=False) if narrow else nn.Identity()
        self.attention = LuongAttention(
            hidden, hidden if narrow else directions * hidden, config.score,
            output_dim=hidden, backend=backend,
        )  # fmt: skip
        self.output = nn.Linear(hidden, target_size)
        self.dropout = nn.Dropout(config.dropout)

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, State]:
        """Read the source.

        source: int64 (B, S), padded at the end. lengths: int64 (B,), 1..S, on the CPU, any order.

        Returns the memory (B, S, E) and the state that the decoder starts with.
        """
        embedded = self.dropout(self.source_embedding(source))
        if int(lengths.min()) == source.shape[1]:
            memory, final = self.encoder(embedded)  # packing costs a quarter more time
        else:
            packed = pack_padded_sequence(embedded, lengths, True, enforce_sorted=False)
            states, final = self.encoder(packed)
            memory, _ = pad_packed_sequence(states, True, total_length=source.shape[1])
        return self.memory_proj(memory), self._bridge(final)

    def _bridge(self, final: Tensor | tuple[Tensor, Tensor]) -> State:
        """Map the encoder's last states, per layer both directions side by side, to the decoder."""
        tensors = final if isinstance(final, tuple) else (final,)
        layers = self.config.layers
        wide = (t.unflatten(0, (layers, -1)).transpose(1, 2).flatten(2) for t in tensors)
        return tuple(torch.tanh(linear(t)) for linear, t in zip(self.bridge, wide, strict=True))

    def decode(
        self,
        inputs: Tensor,
        state: State,
        memory: Tensor | PreparedMemory,
        memory_lengths: Tensor | None = None,
        *,
        return_weights: bool = False,
    ) -> tuple[Tensor, State, Tensor | None]:
        """Run the decoder over given symbols: all of them in training, one at a time in search.

        inputs: int64 (B, T), the symbols before those to predict.
        state: from `encode`, or from the call before.
        memory, memory_lengths: as `LuongAttention` takes them.

        Returns the logits (B, T, target_size), the next state, and the alignment weights
        (B, T, S) or None.
        """
        embedded = self.dropout(self.target_embedding(inputs))
        hidden, after = self.decoder(embedded, state if len(state) > 1 else state[0])
        # h~_t = tanh(W_c [c_t; h_t]), eq. 5
        attentional, weights = self.attention(
            hidden, memory, memory_lengths, return_weights=return_weights
        )
        next_state = after if isinstance(after, tuple) else (after,)
        return self.output(self.dropout(attentional)), next_state, weights

    def forward(self, source: Tensor, source_lengths: Tensor, inputs: Tensor) -> Tensor:
        """Return the logits (B, T, target_size) of the symbols that follow each of ``inputs``.

        source: int64 (B, S). source_lengths: int64 (B,). inputs: int64 (B, T), from BOS on.
        """
        memory, state = self.encode(source, source_lengths)
        logits, _, _ = self.decode(inputs, state, memory, source_lengths)
        return logits

    def loss(self, source: Tensor, source_lengths: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats over the target symbols that are not padding.

        target: int64 (B, T + 1), from BOS to EOS, padded at the end.
        """
        logits = self(source, source_lengths, target[:, :-1])
        return cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=PAD)

    def prepare_memory(self, memory: Tensor, lengths: Tensor) -> PreparedMemory:
        """Return the memory (B, S, E) with what the attention can compute before the first step."""
        return self.attention.prepare_memory(memory, lengths)
