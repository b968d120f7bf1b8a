"""Plain decoders with the names, parameters and behaviour of other toolkits' decoders.

Like tests/peers.py they are written from the documented behaviour: one cell, one step and one
formula at a time. `to_luong_decoder` is tested against them.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import peers
import torch
from torch import Tensor, nn


def rename(module: nn.Module, name: str) -> Any:
    """Give a module's class the original's name, as in a user's model."""
    module.__class__ = type(name, (type(module),), {})
    return module


class StackedCells(nn.Module):
    """StackedLSTM and StackedGRU of OpenNMT-py: dropout between the layers."""

    def __init__(self, kind: str, layers: int, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        cell = nn.LSTMCell if kind == "LSTM" else nn.GRUCell
        widths = [width] + [hidden] * (layers - 1)
        self.layers = nn.ModuleList(cell(size, hidden) for size in widths)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        rows = []
        for number, cell in enumerate(self.layers):
            x = x if number == 0 else self.dropout(x)
            before = tuple(part[number] for part in state)
            after = cell(x, before if len(before) == 2 else before[0])
            rows.append(after if isinstance(after, tuple) else (after,))
            x = rows[-1][0]
        return x, tuple(torch.stack(column) for column in zip(*rows, strict=True))


class OpenNMTEmbeddings(nn.Module):
    """Words, and features that are concatenated; the inputs are (N, T, 1 + features)."""

    def __init__(self, symbols: int, width: int, dropout: float, extra: Any = ()) -> None:
        super().__init__()
        tables = [nn.Embedding(symbols, width, padding_idx=1)]
        tables += [nn.Embedding(3, 2) for name in extra if name == "feature"]
        self.make_embedding = nn.Sequential()
        self.make_embedding.add_module("emb_luts", nn.ModuleList(tables))
        if "position" in extra:
            self.make_embedding.add_module("pe", rename(nn.Identity(), "PositionalEncoding"))
        self.embedding_size = sum(table.embedding_dim for table in tables)
        self.dropout, self.dropout_p = nn.Dropout(dropout), dropout

    def forward(self, source: Tensor) -> Tensor:
        tables = self.make_embedding[0]
        parts = [table(source[:, :, number]) for number, table in enumerate(tables)]
        return self.dropout(torch.cat(parts, dim=-1))


class OpenNMTDecoder(nn.Module):
    """InputFeedRNNDecoder, or StdRNNDecoder if ``feeds`` is False, of OpenNMT-py 3."""

    def __init__(
        self,
        rnn_type: str,
        layers: int,
        hidden: int,
        attn_type: str | None,
        embeddings: OpenNMTEmbeddings,
        *,
        feeds: bool,
        attn_func: str = "softmax",
        dropout: float = 0.0,
        bidirectional: bool = False,
        coverage: bool = False,
        copies: bool = False,
        gated: bool = False,
    ) -> None:
        super().__init__()
        self.bidirectional_encoder, self.num_layers = bidirectional, layers
        self.hidden_size, self.attentional = hidden, attn_type is not None
        self.embeddings, self.dropout = embeddings, nn.Dropout(dropout)
        self.feeds, self.state = feeds, {}
        width = embeddings.embedding_size + (hidden if feeds else 0)
        if feeds:
            self.rnn: Any = StackedCells(rnn_type, layers, width, hidden, dropout)
        else:
            between = dropout if layers > 1 else 0.0
            options = {"num_layers": layers, "batch_first": True, "dropout": between}
            self.rnn = getattr(nn, rnn_type)(width, hidden, **options)
        self.context_gate = nn.Identity() if gated else None
        self._coverage, self._reuse_copy_attn = coverage, False
        arguments = (hidden, coverage, attn_type, attn_func)
        attends = attn_type is not None
        self.attn = peers.named("GlobalAttention", peers.OpenNMT, *arguments) if attends else None
        self.copy_attn = nn.Identity() if copies else None

    def init_state(self, final: Any) -> None:
        parts = final if isinstance(final, tuple) else (final,)
        if self.bidirectional_encoder:
            halves = [(part[::2], part[1::2]) for part in parts]
            parts = tuple(torch.cat(pair, dim=2) for pair in halves)
        first = parts[0]
        self.state = {"hidden": parts, "fed": first.new_zeros(first.shape[1], self.hidden_size)}

    def forward(self, tgt: Tensor, enc_out: Tensor, src_len: Any = None) -> tuple[Tensor, Any]:
        embedded, state, weights = self.embeddings(tgt), self.state["hidden"], []
        if not self.feeds:
            outputs, after = self.rnn(embedded, state if len(state) == 2 else state[0])
            self.state["hidden"] = after if isinstance(after, tuple) else (after,)
            if self.attn is None:
                return self.dropout(outputs), None
            states, aligned = self.attn(outputs, enc_out, src_len=src_len)
            return self.dropout(states), aligned
        outputs, fed = [], self.state["fed"]
        for t in range(tgt.shape[1]):
            output, state = self.rnn(torch.cat([embedded[:, t], fed], dim=1), state)
            if self.attn is not None:
                output, aligned = self.attn(output, enc_out, src_len=src_len)
                weights.append(aligned)
            fed = self.dropout(output)
            outputs.append(fed)
        self.state = {"hidden": state, "fed": fed}
        return torch.stack(outputs, dim=1), torch.stack(weights, dim=1) if weights else None


class JoeyEmbeddings(nn.Module):
    def __init__(self, width: int, symbols: int, scale: bool) -> None:
        super().__init__()
        self.embedding_dim, self.scale = width, scale
        self.lut = nn.Embedding(symbols, width, padding_idx=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.lut(x) * (math.sqrt(self.embedding_dim) if self.scale else 1.0)


class JoeyDecoder(nn.Module):
    """RecurrentDecoder of JoeyNMT 2; ``old`` has the names of JoeyNMT 1."""

    def __init__(
        self,
        rnn_type: str,
        width: int,
        hidden: int,
        memory: int,
        attention: str,
        layers: int,
        symbols: int,
        *,
        init_hidden: str = "bridge",
        feeds: bool = True,
        dropout: float = 0.0,
        emb_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        activation: Any = torch.tanh,
        old: bool = False,
    ) -> None:
        super().__init__()
        self.input_feeding, self.hidden_size, self.emb_size = feeds, hidden, width
        self.num_layers, self.type = layers, rnn_type
        rnn = nn.GRU if rnn_type == "gru" else nn.LSTM
        between = dropout if layers > 1 else 0.0
        fed = width + (hidden if feeds else 0)
        self.rnn = rnn(fed, hidden, layers, batch_first=True, dropout=between)
        self.att_vector_layer = nn.Linear(hidden + memory, hidden)
        self.output_layer = nn.Linear(hidden, symbols, bias=False)
        if attention == "bahdanau":
            arguments: Any = ("BahdanauAttention", peers.JoeyBahdanau, hidden, memory, hidden)
        else:
            arguments = ("LuongAttention", peers.JoeyLuong, hidden, memory)
        self.attention = peers.named(*arguments)
        if init_hidden == "bridge":
            self.bridge_layer = nn.Linear(memory, hidden)
        drop = nn.Dropout(emb_dropout)
        self.hidden_dropout = nn.Dropout(hidden_dropout)
        if old:
            self.rnn_input_dropout, self.bridge = drop, init_hidden == "bridge"
        else:
            self.emb_dropout, self.init_hidden_option = drop, init_hidden
            self.activation = activation
        self._drop = [drop]

    def init_hidden(self, final: Tensor, option: str) -> Any:
        if option == "bridge":
            final = torch.tanh(self.bridge_layer(final))
        elif option == "last":
            final = final[:, : self.hidden_size]
        else:
            final = torch.zeros(len(final), self.hidden_size, dtype=final.dtype)
        hidden = torch.stack([final] * self.num_layers)
        return (hidden, hidden) if self.type == "lstm" else hidden

    def forward(self, embedded: Tensor, memory: Tensor, mask: Tensor, hidden: Any) -> Any:
        """The logits, hidden state, weights and attentional vectors from embedded symbols."""
        self.attention.compute_proj_keys(memory)
        fed = embedded.new_zeros(len(embedded), 1, self.hidden_size)
        vectors, weights = [], []
        for t in range(embedded.shape[1]):
            x = embedded[:, t : t + 1]
            x = torch.cat([x, fed], dim=2) if self.input_feeding else x
            _, hidden = self.rnn(self._drop[0](x), hidden)
            query = (hidden[0] if isinstance(hidden, tuple) else hidden)[-1][:, None]
            context, aligned = self.attention(query, mask, memory)
            both = self.hidden_dropout(torch.cat([query, context], dim=2))
            fed = torch.tanh(self.att_vector_layer(both))
            vectors.append(fed)
            weights.append(aligned)
        states = torch.cat(vectors, dim=1)
        return self.output_layer(states), hidden, torch.cat(weights, dim=1), states


class FairseqDropout(nn.Dropout):
    apply_during_inference = False


class FairseqDecoder(nn.Module):
    """LSTMDecoder of fairseq."""

    def __init__(
        self,
        symbols: int,
        width: int,
        hidden: int,
        out: int,
        layers: int,
        units: int,
        *,
        attention: bool = True,
        tied: bool = False,
        dropout_in: float = 0.0,
        dropout_out: float = 0.0,
        residuals: bool = False,
        adaptive: bool = False,
    ) -> None:
        super().__init__()
        self.dropout_in_module = FairseqDropout(dropout_in)
        self.dropout_out_module = FairseqDropout(dropout_out)
        self.hidden_size, self.num_layers, self.residuals = hidden, layers, residuals
        self.share_input_output_embed, self.encoder_output_units = tied, units
        self.embed_tokens = nn.Embedding(symbols, width, padding_idx=1)
        bridged = units not in (hidden, 0)
        self.encoder_hidden_proj = nn.Linear(units, hidden) if bridged else None
        self.encoder_cell_proj = nn.Linear(units, hidden) if bridged else None
        widths = [width + (hidden if units else 0)] + [hidden] * (layers - 1)
        self.layers = nn.ModuleList(nn.LSTMCell(size, hidden) for size in widths)
        arguments: Any = ("AttentionLayer", peers.Fairseq, hidden, units, hidden, False)
        self.attention = peers.named(*arguments) if attention else None
        if hidden != out:
            self.additional_fc = nn.Linear(hidden, out)
        self.adaptive_softmax = nn.Identity() if adaptive else None
        if not tied:
            self.fc_out = nn.Linear(out, symbols)

    def start(self, final: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        if self.encoder_hidden_proj is None:
            return final
        return self.encoder_hidden_proj(final[0]), self.encoder_cell_proj(final[1])

    def forward(self, tokens: Tensor, memory: Tensor, padding: Any, state: Any) -> SimpleNamespace:
        """``memory`` (S, N, E), ``padding`` (S, N) True = ignore, ``state`` (h, c) by layer."""
        embedded = self.dropout_in_module(self.embed_tokens(tokens))
        h, c = list(state[0]), list(state[1])
        fed = embedded.new_zeros(len(tokens), self.hidden_size)
        outputs, weights = [], []
        for t in range(tokens.shape[1]):
            x = embedded[:, t]
            x = torch.cat([x, fed], dim=1) if self.encoder_output_units else x
            for number, cell in enumerate(self.layers):
                h[number], c[number] = cell(x, (h[number], c[number]))
                x = self.dropout_out_module(h[number])
            output = h[-1]
            if self.attention is not None:
                output, aligned = self.attention(output, memory, padding)
                weights.append(aligned.T)
            fed = self.dropout_out_module(output)
            outputs.append(fed)
        states = features = torch.stack(outputs, dim=1)
        if hasattr(self, "additional_fc"):
            features = self.dropout_out_module(self.additional_fc(features))
        table = self.embed_tokens.weight
        logits = features @ table.T if self.share_input_output_embed else self.fc_out(features)
        aligned = torch.stack(weights, dim=1) if weights else None
        hidden = (torch.stack(h), torch.stack(c))
        return SimpleNamespace(logits=logits, states=states, weights=aligned, hidden=hidden)
