"""Keras: `Attention` and `AdditiveAttention`, as PyTorch modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_attn import checks
from fused_attn.interop.adapter import attend_concat, attend_dot, attend_keys
from fused_attn.reference import Masking, zero_uncounted_rows


class _KerasAttention(nn.Module):
    """inputs: [query (B, T, D), value (B, S, D)], optionally with key (B, S, D) as a third.

    mask: [query_mask (B, T), value_mask (B, S)], True = attend; each may be None. Returns the
    context (B, T, D), and the weights (B, T, S) if return_attention_scores, after dropout as in
    Keras. The context is 0 where query_mask is False. The weight of padding is exactly 0 here;
    Keras subtracts 1e9 from its score.
    """

    def __init__(self, dropout: float, seed: int | None) -> None:
        super().__init__()
        self.dropout = checks.probability("dropout", dropout)
        if self.dropout == 1.0:
            raise ValueError(f"dropout must be a probability below 1, got {dropout!r}")
        self.seed = seed
        self._generator: torch.Generator | None = None

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, masking: Masking
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward(
        self,
        inputs: list[Tensor],
        mask: list[Tensor | None] | None = None,
        training: bool | None = None,
        return_attention_scores: bool = False,
        use_causal_mask: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if not isinstance(inputs, list) or len(inputs) not in (2, 3):
            got = f"a list of {len(inputs)}" if isinstance(inputs, list) else type(inputs).__name__
            raise ValueError(
                f"inputs must be a list [query, value] or [query, value, key], got {got}"
            )
        query, value = inputs[:2]
        key = inputs[2] if len(inputs) == 3 else value
        checks.check_memory(value)
        checks.check_query(query, value, "value", value.shape[2])
        query_mask, value_mask = (mask or [None, None])[:2]
        allowed = checks.check_mask(value_mask, value, query.shape[1])
        allowed = None if allowed is None else allowed.unsqueeze(1)
        if use_causal_mask:
            size = (query.shape[1], value.shape[1])
            causal = torch.ones(size, dtype=torch.bool, device=query.device).tril()
            allowed = causal.expand(value.shape[0], *size) if allowed is None else allowed & causal
        training = self.training if training is None else training
        keep, keep_scale = self._keep(query, value) if training and self.dropout else (None, 1.0)
        masking = Masking(None, allowed, keep, keep_scale)
        context, weights = self._attend(query, key, value, masking)
        if query_mask is not None:
            context = context * query_mask[..., None].to(context.dtype)
        if not return_attention_scores:
            return context
        return context, weights if keep is None else weights * keep * keep_scale

    def _keep(self, query: Tensor, value: Tensor) -> tuple[Tensor, float]:
        if self._generator is None and self.seed is not None:
            self._generator = torch.Generator(query.device).manual_seed(self.seed)
        shape = (query.shape[0], query.shape[1], value.shape[1])
        drawn = torch.rand(shape, device=query.device, generator=self._generator)
        return drawn >= self.dropout, 1.0 / (1.0 - self.dropout)

    @staticmethod
    def _summed(
        query: Tensor, key: Tensor, v: Tensor, value: Tensor, masking: Masking
    ) -> tuple[Tensor, Tensor]:
        """Score ``v . tanh(q + k)``: the concat operator without projections."""
        return attend_concat(query, key, None, v, value, masking)


class KerasAttention(_KerasAttention):
    """keras.layers.Attention: dot score, or "concat" without projections.

    "concat" is ``w sum_d tanh(s (q_d + k_d))`` with scalars w and s, that is the concat operator
    with equal entries in v. Parameters: ``scale`` () with use_scale, ``concat_score_weight`` () for
    "concat".
    """

    peer = "Keras Attention"

    def __init__(
        self,
        use_scale: bool = False,
        score_mode: str = "dot",
        dropout: float = 0.0,
        seed: int | None = None,
    ) -> None:
        super().__init__(dropout, seed)
        if score_mode not in ("dot", "concat"):
            raise ValueError(f"score_mode must be 'dot' or 'concat', got {score_mode!r}")
        self.score_mode = score_mode
        self.scale = nn.Parameter(torch.ones(())) if use_scale else None
        is_concat = score_mode == "concat"
        self.concat_score_weight = nn.Parameter(torch.ones(())) if is_concat else None

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, masking: Masking
    ) -> tuple[Tensor, Tensor]:
        scale: Any = 1.0 if self.scale is None else self.scale
        if self.concat_score_weight is not None:
            v = self.concat_score_weight.to(query.dtype).expand(query.shape[-1])
            key = zero_uncounted_rows(key, masking) * scale  # keeps 0 * NaN out of scale's gradient
            return self._summed(query * scale, key, v, value, masking)
        if key is value:
            return attend_dot(query, value, scale, masking)
        return attend_keys(query, key, value, scale, masking)


class KerasAdditiveAttention(_KerasAttention):
    """keras.layers.AdditiveAttention: score ``sum_d s_d tanh(q_d + k_d)``.

    s is the parameter ``scale`` (D,) with use_scale, and ones without it. D is taken from the first
    query.
    """

    peer = "Keras AdditiveAttention"

    def __init__(
        self, use_scale: bool = True, dropout: float = 0.0, seed: int | None = None
    ) -> None:
        super().__init__(dropout, seed)
        self.scale = nn.UninitializedParameter() if use_scale else None

    def build(self, width: int) -> None:
        """Create ``scale`` (width,), initialised as in Keras (glorot_uniform)."""
        if isinstance(self.scale, nn.UninitializedParameter):
            self.scale.materialize((width,))
            nn.init.uniform_(self.scale, -((3.0 / width) ** 0.5), (3.0 / width) ** 0.5)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, masking: Masking
    ) -> tuple[Tensor, Tensor]:
        width = query.shape[-1]
        self.build(width)
        v = query.new_ones(width) if self.scale is None else self.scale.to(query.dtype)
        return self._summed(query, key, v, value, masking)
