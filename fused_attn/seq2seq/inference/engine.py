"""Where a predictor searches: in one native call on packed models, or step by step in torch.

Also the search options that callers give by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from fused_attn import choices
from fused_attn.seq2seq.config import SearchConfig
from fused_attn.seq2seq.data.examples import pad
from fused_attn.seq2seq.devices import moved
from fused_attn.seq2seq.errors import OptionError
from fused_attn.seq2seq.model.modes import evaluating
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.option_rules import SEARCH_NEEDS, settle
from fused_attn.seq2seq.search.constraints import LengthBound
from fused_attn.seq2seq.search.hypothesis import Hypothesis
from fused_attn.seq2seq.search.packed import PackedModels, not_native_reasons
from fused_attn.seq2seq.search.search import search

COMPUTE = ("auto", *choices.COMPUTE)
_GREEDY = SearchConfig()
_DEFAULTS = asdict(_GREEDY)


class Engine:
    """Searches with one or several models.

    Args:
        models: with the same vocabularies, on one device.
        bound: bounds the length of targets.
        compute: type of the products of the native decoder, "float32", "bfloat16" or "int8".
            "auto" takes ``stored``, and torch if the models cannot be decoded natively.
        stored: what "auto" means, "float32" or "int8".

    Raises `InputError` if ``compute`` is unknown, or names a type for models that cannot be decoded
    natively.
    """

    def __init__(
        self,
        models: Sequence[Seq2Seq],
        bound: LengthBound,
        compute: str = "auto",
        stored: str = "float32",
    ) -> None:
        if compute not in COMPUTE:
            raise OptionError("compute", f"must be one of {', '.join(COMPUTE)}, got {compute!r}")
        self.models = models
        self.bound = bound
        self.compute = stored if compute == "auto" else compute
        self._is_required = compute != "auto"
        self._packed: PackedModels | None = None
        if self._is_required:
            self._check(not_native_reasons(models))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": None}  # a copy packs its own models

    def packed_models(self) -> PackedModels | None:
        """Return the packed models, None if they must run in torch.

        They are packed at the first call, and again once a parameter has changed; see
        `PackedModels.is_of`. Raises `InputError` if ``compute`` needs what is not possible.
        """
        if self._packed is None or not self._packed.is_of(self.models):
            self._packed = None
            if reasons := not_native_reasons(self.models):
                self._check(reasons)
            else:
                self._packed = PackedModels(self.models, self.compute)
        return self._packed

    def _check(self, reasons: list[str]) -> None:
        if self._is_required and reasons:
            why = "; ".join(reasons)
            raise OptionError("compute", f"needs the native decoder, which cannot be used: {why}")

    def search(
        self,
        encoded: Sequence[Sequence[int]],
        config: SearchConfig,
        prefix: torch.Tensor | None,
        return_weights: bool,
    ) -> list[list[Hypothesis]]:
        """Search for the targets of sources, given as ids; see `search.search`."""
        symbols, lengths = pad(encoded)
        packed = self.packed_models()
        rest: dict[str, Any] = {"bound": self.bound, "return_weights": return_weights}
        if packed is not None:
            rest |= {"packed": packed, "prefix": prefix}
            return search(self.models, symbols, lengths, config, **rest)
        device = next(self.models[0].parameters()).device
        rest["prefix"] = None if prefix is None else moved(prefix, device)
        with evaluating(self.models):
            return search(self.models, moved(symbols, device), lengths, config, **rest)


def search_config(options: Mapping[str, Any]) -> SearchConfig:
    """Return the search configuration for options that were given by name.

    Raises TypeError for an unknown name, ValueError for a value, `InputError` for an option that
    has no effect.
    """
    if not options:
        return _GREEDY
    for name in options:
        if name not in _DEFAULTS:
            raise TypeError(
                f"unknown search option {name!r}, expected one of {', '.join(_DEFAULTS)}"
            )
    config = SearchConfig(**options)
    # A `Prediction` shows its score and its alternatives.
    shown = {"shows_scores": True, "returns_several": True, "own_beam": False}
    settle(SEARCH_NEEDS, _DEFAULTS | shown, options)
    return config
