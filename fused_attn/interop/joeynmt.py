"""JoeyNMT: `BahdanauAttention` and `LuongAttention`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fused_attn.interop.adapter import Adapter, attend_dot, attend_energy, attend_keys, projected
from fused_attn.modules import beside_forward, readable_weight
from fused_attn.prepared import exponentials
from fused_attn.reference import Masking


class _JoeyAttention(Adapter):
    signatures = (("query", "mask", "values"),)
    key_size: int

    def _check(self, query: Tensor, mask: Tensor, values: Tensor, query_size: int) -> Masking:
        """Check the shapes, and return the mask (B, 1, S), non-zero = attend."""
        batch, source, key_size = values.shape[0], values.shape[1], self.key_size
        for name, tensor, expected in (
            ("query", query, (batch, 1, query_size)),
            ("mask", mask, (batch, 1, source)),
            ("values", values, (batch, source, key_size)),
        ):
            if tensor is None or tuple(tensor.shape) != expected:
                got = None if tensor is None else tuple(tensor.shape)
                raise ValueError(f"{name} must have shape {expected}, got {got}")
        return Masking(memory_mask=mask > 0)


class JoeyBahdanauAttention(_JoeyAttention):
    """joeynmt.attention.BahdanauAttention: the concat score without a bias.

    Call `compute_proj_keys(keys)` once for a batch, then forward(query (B, 1, D), mask (B, 1, S)
    with True = attend, values (B, S, E)) at every step, which returns the context (B, 1, E) and the
    weights (B, 1, S). As in JoeyNMT, the projected keys are stored on the module.
    """

    peer = "JoeyNMT BahdanauAttention"
    peer_class = "BahdanauAttention"

    def __init__(self, hidden_size: int = 1, key_size: int = 1, query_size: int = 1) -> None:
        super().__init__()
        self.key_size, self.query_size = key_size, query_size
        self.key_layer = nn.Linear(key_size, hidden_size, bias=False)
        self.query_layer = nn.Linear(query_size, hidden_size, bias=False)
        self.energy_layer = nn.Linear(hidden_size, 1, bias=False)
        self.proj_keys: Tensor | None = None
        self.proj_query: Tensor | None = None
        self._exponentials: Tensor | None = None

    @classmethod
    def options_of(cls, layer: Any) -> dict[str, Any]:
        keys, queries = layer.key_layer, layer.query_layer
        sizes = (keys.out_features, keys.in_features, queries.in_features)
        return dict(zip(("hidden_size", "key_size", "query_size"), sizes, strict=True))

    @beside_forward
    def compute_proj_keys(self, keys: Tensor) -> Tensor:
        """Project the keys (B, S, E) to (B, S, hidden_size), and store them for `forward`.

        Unlike in JoeyNMT they are also returned, for the hooks of fully_shard.
        """
        self.proj_keys = proj_keys = projected(self.key_layer, keys)
        self._exponentials = exponentials(proj_keys)
        return proj_keys

    def compute_proj_query(self, query: Tensor) -> None:
        """Project the query (B, 1, D), and store it as ``proj_query``."""
        self.proj_query = self.query_layer(query)

    def forward(self, query: Tensor, mask: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        masking = self._check(query, mask, values, self.query_size)
        if self.proj_keys is None:
            raise ValueError("compute_proj_keys must be called before forward")
        self.compute_proj_query(query)
        assert self.proj_query is not None
        operands = (self.proj_query, self.proj_keys, self._exponentials, self.energy_layer)
        return attend_energy(*operands, 1.0, values, masking)


class JoeyLuongAttention(_JoeyAttention):
    """joeynmt.attention.LuongAttention: the general score, with its matrix applied to the memory.

    Used like `JoeyBahdanauAttention`. `compute_proj_keys` stores the keys, not their projection:
    because of ``q . (W m) = (W^T q) . m`` the query is projected instead of the memory. If the key
    layer is wrapped (by hooks, LoRA, sharding), it projects the keys as in JoeyNMT.
    """

    peer = "JoeyNMT LuongAttention"
    peer_class = "LuongAttention"

    def __init__(self, hidden_size: int = 1, key_size: int = 1) -> None:
        super().__init__()
        self.hidden_size, self.key_size = hidden_size, key_size
        self.key_layer = nn.Linear(key_size, hidden_size, bias=False)
        self.proj_keys: Tensor | None = None
        self._projection: Tensor | None = None

    @classmethod
    def options_of(cls, layer: Any) -> dict[str, Any]:
        keys = layer.key_layer
        return {"hidden_size": keys.out_features, "key_size": keys.in_features}

    @beside_forward
    def compute_proj_keys(self, keys: Tensor) -> Tensor:
        """Store the keys (B, S, E) for `forward`, and return them, for the hooks of fully_shard."""
        self.proj_keys = keys
        is_read = readable_weight(self.key_layer, at_call=False) is not None
        self._projection = None if is_read else projected(self.key_layer, keys)
        return keys if self._projection is None else self._projection

    def forward(self, query: Tensor, mask: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        masking = self._check(query, mask, values, self.hidden_size)
        if self.proj_keys is None:
            raise ValueError("compute_proj_keys must be called before forward")
        weight = readable_weight(self.key_layer, at_call=False)
        if self._projection is None and weight is None:  # wrapped after compute_proj_keys
            self._projection = projected(self.key_layer, self.proj_keys)
        if self._projection is not None:
            return attend_keys(query, self._projection, values, 1.0, masking)
        assert weight is not None
        query = query @ weight
        if self.proj_keys is not values:  # separate keys and values
            return attend_keys(query, self.proj_keys, values, 1.0, masking)
        return attend_dot(query, values, 1.0, masking)
