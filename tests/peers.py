"""Small eager layers with the names, parameters and behaviour of other toolkits' attention.

They are written as formulas from the toolkits' documentation and signatures. Adapters are tested
against them, and `swap` finds them in models. Padding is treated as in the originals (-inf or
-65504), and submodules are called as in the originals.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def softmax(scores: Tensor, keep: Tensor | None, fill: float = -torch.inf) -> Tensor:
    """Softmax over the last dimension. With -inf, a fully masked row is NaN as in the originals."""
    return torch.softmax(scores if keep is None else scores.masked_fill(~keep, fill), -1)


def sparsemax(scores: Tensor, keep: Tensor | None) -> Tensor:
    """The projection onto the simplex: z - tau, with tau from the largest valid support."""
    scores = scores if keep is None else scores.masked_fill(~keep, -1e9)
    ranked = scores.sort(dim=-1, descending=True).values
    sizes = torch.arange(1, scores.shape[-1] + 1, dtype=scores.dtype)
    sums = ranked.cumsum(-1)
    size = (1 + sizes * ranked > sums).sum(-1, keepdim=True)
    return (scores - (sums.gather(-1, size - 1) - 1) / size).clamp(min=0)


def below(lengths: Tensor | None, source: int) -> Tensor | None:
    return None if lengths is None else torch.arange(source) < lengths[:, None]


def additive(query: Tensor, keys: Tensor, v: Any) -> Tensor:
    """v . tanh(q_t + k_s) of (B, T, A) and (B, S, A): (B, T, S). v: (A,), or a layer A -> 1."""
    hidden = torch.tanh(query[:, :, None] + keys[:, None])
    return v(hidden)[..., 0] if isinstance(v, nn.Module) else torch.einsum("btsa,a->bts", hidden, v)


class OpenNMT(nn.Module):
    """GlobalAttention of OpenNMT-py."""

    def __init__(self, dim: int, coverage: bool, attn_type: str, attn_func: str) -> None:
        super().__init__()
        self.dim, self.attn_type, self.attn_func = dim, attn_type, attn_func
        if attn_type == "general":
            self.linear_in = nn.Linear(dim, dim, bias=False)
        if attn_type == "mlp":
            self.linear_context = nn.Linear(dim, dim, bias=False)
            self.linear_query = nn.Linear(dim, dim)
            self.v = nn.Linear(dim, 1, bias=False)
        self.linear_out = nn.Linear(2 * dim, dim, bias=attn_type == "mlp")
        if coverage:
            self.linear_cover = nn.Linear(1, dim, bias=False)

    def forward(self, src: Any, enc_out: Any, src_len: Any = None, coverage: Any = None) -> Any:
        keep = below(src_len, enc_out.shape[1])
        return self.run(src, enc_out, None if keep is None else keep[:, None], coverage)

    def run(self, source: Any, memory: Any, keep: Any, coverage: Any) -> tuple[Tensor, Tensor]:
        query = source if source.dim() == 3 else source[:, None]
        if coverage is not None:
            memory = torch.tanh(memory + self.linear_cover(coverage[..., None]))
        if self.attn_type == "mlp":
            scores = additive(self.linear_query(query), self.linear_context(memory), self.v)
        else:
            projected = self.linear_in(query) if self.attn_type == "general" else query
            scores = torch.einsum("btd,bsd->bts", projected, memory)
        weights = (softmax if self.attn_func == "softmax" else sparsemax)(scores, keep)
        context = torch.einsum("bts,bsd->btd", weights, memory)
        state = self.linear_out(torch.cat([context, query], -1))
        state = state if self.attn_type == "mlp" else torch.tanh(state)
        return (state, weights) if source.dim() == 3 else (state[:, 0], weights[:, 0])


class OpenNMT2(OpenNMT):
    """GlobalAttention before 3.0: other argument names, and results are time first."""

    def forward(
        self, source: Any, memory_bank: Any, memory_lengths: Any = None, coverage: Any = None
    ) -> Any:
        results = super().forward(source, memory_bank, memory_lengths, coverage)
        return tuple(r.transpose(0, 1) for r in results) if source.dim() == 3 else results


class Eole(OpenNMT):
    """A mask (B, 1, S), True = padding, instead of lengths; an unused linear_cover is None."""

    def __init__(self, dim: int, coverage: bool, attn_type: str, attn_func: str) -> None:
        super().__init__(dim, coverage, attn_type, attn_func)
        if not coverage:
            self.linear_cover = None

    def forward(
        self, src: Any, enc_out: Any, src_pad_mask: Any = None, coverage: Any = None
    ) -> Any:
        keep = None if src_pad_mask is None else ~src_pad_mask
        return self.run(src, enc_out, keep, coverage)


class JoeyBahdanau(nn.Module):
    def __init__(self, hidden_size: int, key_size: int, query_size: int) -> None:
        super().__init__()
        self.key_layer = nn.Linear(key_size, hidden_size, bias=False)
        self.query_layer = nn.Linear(query_size, hidden_size, bias=False)
        self.energy_layer = nn.Linear(hidden_size, 1, bias=False)
        self.proj_keys: Any = None

    def compute_proj_keys(self, keys: Tensor) -> None:
        self.proj_keys = self.key_layer(keys)

    def forward(self, query: Any, mask: Any, values: Any) -> tuple[Tensor, Tensor]:
        scores = additive(self.query_layer(query), self.proj_keys, self.energy_layer)
        weights = softmax(scores, mask > 0)
        return weights @ values, weights


class JoeyLuong(nn.Module):
    def __init__(self, hidden_size: int, key_size: int) -> None:
        super().__init__()
        self.key_layer = nn.Linear(key_size, hidden_size, bias=False)
        self.proj_keys: Any = None

    def compute_proj_keys(self, keys: Tensor) -> None:
        self.proj_keys = self.key_layer(keys)

    def forward(self, query: Any, mask: Any, values: Any) -> tuple[Tensor, Tensor]:
        weights = softmax(query @ self.proj_keys.mT, mask > 0)
        return weights @ values, weights


class Fairseq(nn.Module):
    def __init__(self, input_dim: int, source_dim: int, output_dim: int, bias: bool) -> None:
        super().__init__()
        self.input_proj = nn.Linear(input_dim, source_dim, bias=bias)
        self.output_proj = nn.Linear(input_dim + source_dim, output_dim, bias=bias)

    def forward(self, input: Any, source_hids: Any, encoder_padding_mask: Any) -> Any:
        scores = torch.einsum("be,sbe->bs", self.input_proj(input), source_hids)
        keep = None if encoder_padding_mask is None else ~encoder_padding_mask.T
        weights = softmax(scores, keep)
        context = torch.einsum("bs,sbe->be", weights, source_hids)
        return torch.tanh(self.output_proj(torch.cat([context, input], 1))), weights.T


class GNMT(nn.Module):
    def __init__(
        self, query_size: int, key_size: int, num_units: int, normalize: bool, batch_first: bool
    ) -> None:
        super().__init__()
        self.normalize, self.batch_first, self.num_units = normalize, batch_first, num_units
        self.linear_q = nn.Linear(query_size, num_units, bias=False)
        self.linear_k = nn.Linear(key_size, num_units, bias=False)
        self.linear_att = nn.Parameter(torch.randn(num_units))
        self.normalize_scalar = nn.Parameter(torch.rand(1) + 0.5) if normalize else None
        self.normalize_bias = nn.Parameter(torch.randn(num_units)) if normalize else None
        self.mask: Any = None

    def set_mask(self, context_len: Tensor, context: Tensor) -> None:
        self.mask = ~below(context_len, context.shape[1 if self.batch_first else 0])

    def forward(self, query: Any, keys: Any) -> tuple[Tensor, Tensor]:
        memory = keys if self.batch_first else keys.transpose(0, 1)
        turned = query.dim() == 3 and not self.batch_first
        states = query.transpose(0, 1) if turned else query
        states = states if states.dim() == 3 else states[:, None]
        v, projected = self.linear_att, self.linear_q(states)
        if self.normalize:
            v = self.normalize_scalar * v / v.square().sum().sqrt()
            projected = projected + self.normalize_bias
        keep = None if self.mask is None else ~self.mask[:, None]
        weights = softmax(additive(projected, self.linear_k(memory), v), keep, -65504.0)
        context = weights @ memory
        if query.dim() == 2:
            return context[:, 0], weights[:, 0]
        return (context.transpose(0, 1), weights.transpose(0, 1)) if turned else (context, weights)


class Tutorial(nn.Module):
    def __init__(self, method: str, hidden_size: int) -> None:
        super().__init__()
        self.method, self.hidden_size = method, hidden_size
        if method == "general":
            self.attn = nn.Linear(hidden_size, hidden_size)
        if method == "concat":
            self.attn = nn.Linear(2 * hidden_size, hidden_size)
            self.v = nn.Parameter(torch.randn(hidden_size))

    def forward(self, hidden: Any, encoder_outputs: Any) -> Tensor:
        states, query = encoder_outputs, hidden.expand_as(encoder_outputs)
        if self.method == "general":
            states = self.attn(states)
        if self.method == "concat":
            energy = torch.tanh(self.attn(torch.cat([query, states], -1)))
            scores = torch.einsum("sbh,h->bs", energy, self.v)
        else:
            scores = torch.einsum("sbh,sbh->bs", query, states)
        return torch.softmax(scores, -1)[:, None]


class SpeechBrain(nn.Module):
    """Content-based attention; location-aware if ``conv`` is given."""

    def __init__(self, enc: int, dec: int, attn: int, out: int, scaling: float, conv: Any) -> None:
        super().__init__()
        self.scaling = scaling
        self.mlp_enc, self.mlp_dec = nn.Linear(enc, attn), nn.Linear(dec, attn)
        self.mlp_attn = nn.Linear(attn, 1, bias=False)
        self.mlp_out = nn.Linear(enc, out)
        self.is_aware = conv is not None
        if conv is not None:
            channels, half = conv
            self.conv_loc = nn.Conv1d(1, channels, 2 * half + 1, padding=half, bias=False)
            self.mlp_loc = nn.Linear(channels, attn)
        self.reset()

    def reset(self) -> None:
        self.prev_attn: Any = None
        self.precomputed_enc_h: Any = None

    def forward(self, enc_states: Any, enc_len: Any, dec_states: Any) -> tuple[Tensor, Tensor]:
        keep = below(enc_len, enc_states.shape[1])
        if self.precomputed_enc_h is None:
            self.precomputed_enc_h = self.mlp_enc(enc_states)
        keys = self.precomputed_enc_h
        if self.is_aware:
            if self.prev_attn is None:
                self.prev_attn = keep / enc_len[:, None].double()
            features = self.conv_loc(self.prev_attn.to(keys.dtype)[:, None])
            keys = keys + self.mlp_loc(features.mT)
        scores = additive(self.mlp_dec(dec_states)[:, None], keys, self.mlp_attn)
        weights = softmax(self.scaling * scores[:, 0], keep)
        self.prev_attn = weights.detach()
        return self.mlp_out(torch.einsum("bs,bse->be", weights, enc_states)), weights


class TFALuong(nn.Module):
    """The mechanism of TensorFlow Addons: its memory is set first, it returns alignments twice."""

    def __init__(self, units: int, memory_dim: int, scale: bool) -> None:
        super().__init__()
        self.memory_layer = nn.Linear(memory_dim, units, bias=False)
        self.attention_g = nn.Parameter(torch.tensor(1.7)) if scale else None

    def setup_memory(self, memory: Tensor, lengths: Tensor | None) -> None:
        self.memory, self.keys = memory, self.memory_layer(memory)
        self.keep = below(lengths, memory.shape[1])

    def scores(self, query: Tensor) -> Tensor:
        scores = torch.einsum("bu,bsu->bs", query, self.keys)
        return scores if self.attention_g is None else scores * self.attention_g

    def forward(self, inputs: Any) -> tuple[Tensor, Tensor]:
        weights = softmax(self.scores(inputs[0]), self.keep)
        return weights, weights


class TFABahdanau(TFALuong):
    def __init__(self, units: int, memory_dim: int, query_dim: int, normalize: bool) -> None:
        super().__init__(units, memory_dim, False)
        self.query_layer = nn.Linear(query_dim, units, bias=False)
        self.attention_v = nn.Parameter(torch.randn(units))
        self.attention_g = nn.Parameter(torch.tensor(0.8)) if normalize else None
        self.attention_b = nn.Parameter(torch.randn(units)) if normalize else None

    def scores(self, query: Tensor) -> Tensor:
        v, hidden = self.attention_v, self.query_layer(query)
        if self.attention_g is not None:
            v, hidden = self.attention_g * v / v.norm(), hidden + self.attention_b
        return additive(hidden[:, None], self.keys, v)[:, 0]


class Keras(nn.Module):
    """Attention ("dot" or "concat") and AdditiveAttention ("additive"), with their scales."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind = kind
        self.scale = nn.Parameter(torch.rand(width) if kind == "additive" else torch.tensor(0.7))
        self.concat_score_weight = nn.Parameter(torch.tensor(1.2)) if kind == "concat" else None

    def forward(self, inputs: Any, return_attention_scores: bool) -> tuple[Tensor, Tensor]:
        query, value, key = inputs
        if self.kind == "dot":
            scores = self.scale * query @ key.mT
        elif self.kind == "additive":
            scores = additive(query, key, self.scale)
        else:
            ones = torch.ones_like(query[0, 0])
            scores = additive(self.scale * query, self.scale * key, self.concat_score_weight * ones)
        weights = torch.softmax(scores, -1)
        return weights @ value, weights


def named(name: str, base: type[nn.Module], *arguments: Any, dtype: Any = torch.float64) -> Any:
    """A layer whose class has the original's name, as in a user's model."""
    torch.manual_seed(0)
    return type(name, (base,), {})(*arguments).to(dtype)
