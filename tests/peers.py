"""Small eager layers with the names, parameters and behaviour that the peers document.

Written from their documentation and signatures as formulas, to be what the adapters are held
against and what `swap` finds in a model. Padding gets the peers' treatment: -inf, or -65504.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def softmax(scores: Tensor, keep: Tensor | None, fill: float = -torch.inf) -> Tensor:
    """Over the last dimension; a row of nothing is NaN with -inf, as in the peers."""
    return torch.softmax(scores if keep is None else scores.masked_fill(~keep, fill), -1)


def below(lengths: Tensor | None, source: int) -> Tensor | None:
    return None if lengths is None else torch.arange(source) < lengths[:, None]


def additive(query: Tensor, keys: Tensor, v: Tensor) -> Tensor:
    """v . tanh(q_t + k_s) of (B, T, A) and (B, S, A): (B, T, S)."""
    return torch.einsum("btsa,a->bts", torch.tanh(query[:, :, None] + keys[:, None]), v)


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
            memory = torch.tanh(memory + coverage[..., None] * self.linear_cover.weight[:, 0])
        if self.attn_type == "mlp":
            keys = memory @ self.linear_context.weight.T
            scores = additive(self.linear_query(query), keys, self.v.weight[0])
        else:
            projected = self.linear_in(query) if self.attn_type == "general" else query
            scores = torch.einsum("btd,bsd->bts", projected, memory)
        weights = softmax(scores, keep)
        context = torch.einsum("bts,bsd->btd", weights, memory)
        state = self.linear_out(torch.cat([context, query], -1))
        state = state if self.attn_type == "mlp" else torch.tanh(state)
        return (state, weights) if source.dim() == 3 else (state[:, 0], weights[:, 0])


class OpenNMT2(OpenNMT):
    """Before 3.0: other names, and sequences come back time first."""

    def forward(
        self, source: Any, memory_bank: Any, memory_lengths: Any = None, coverage: Any = None
    ) -> Any:
        results = super().forward(source, memory_bank, memory_lengths, coverage)
        return tuple(r.transpose(0, 1) for r in results) if source.dim() == 3 else results


class Eole(OpenNMT):
    """A mask (B, 1, S) in place of lengths, True where there is padding; None for a part unused."""

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
        scores = additive(self.query_layer(query), self.proj_keys, self.energy_layer.weight[0])
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
    """Content based; location aware with a convolution."""

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

    def forward(self, enc_states: Any, enc_len: Any, dec_states: Any) -> tuple[Tensor, Tensor]:
        keep = below(enc_len, enc_states.shape[1])
        keys = self.mlp_enc(enc_states)
        if self.is_aware:
            if self.prev_attn is None:
                self.prev_attn = keep / enc_len[:, None].double()
            kernel, half = self.conv_loc.weight[:, 0], self.conv_loc.padding[0]
            padded = nn.functional.pad(self.prev_attn.to(kernel), (half, half))
            features = padded.unfold(1, kernel.shape[1], 1) @ kernel.T
            keys = keys + self.mlp_loc(features)
        scores = additive(self.mlp_dec(dec_states)[:, None], keys, self.mlp_attn.weight[0])
        weights = softmax(self.scaling * scores[:, 0], keep)
        self.prev_attn = weights.detach()
        return self.mlp_out(torch.einsum("bs,bse->be", weights, enc_states)), weights


def named(name: str, base: type[nn.Module], *arguments: Any, dtype: Any = torch.float64) -> Any:
    """A layer of a class with the peer's own name, as a user's model would hold it."""
    torch.manual_seed(0)
    return type(name, (base,), {})(*arguments).to(dtype)
