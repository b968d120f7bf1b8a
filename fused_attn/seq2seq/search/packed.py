"""Decode with packed models: encoder, decoder and search in one call of the native module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_attn import packed
from fused_attn.seq2seq.config import SearchConfig
from fused_attn.seq2seq.model.decoder import Decoder
from fused_attn.seq2seq.model.encoder import Bridge, Encoder
from fused_attn.seq2seq.model.recurrent import Dropout, Stack
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.search.hypothesis import Hypothesis, not_numbers

_OWN = (Seq2Seq, Encoder, Decoder, Bridge, Stack, Dropout)


def not_native_reasons(models: Sequence[Seq2Seq]) -> list[str]:
    """Return why models cannot be decoded natively, in short phrases; empty if they can be."""
    reasons = _reasons_of_now(models)
    for model in models:
        reasons += _reasons(model)
    return list(dict.fromkeys(reasons))


def _reasons_of_now(models: Sequence[Seq2Seq]) -> list[str]:
    """The reasons that do not lie in the modules."""
    return packed.reasons_of_now(*(model.backend for model in models))


def _reasons(model: Seq2Seq) -> list[str]:
    if type(model) is not Seq2Seq:
        return [f"the model is a {type(model).__name__}"]
    reasons = packed.module_reasons(model, _OWN)
    if reasons:
        return reasons
    attention = model.decoder.attention
    return [] if attention is None else packed.attention_reasons(attention)


def spec_of(model: Seq2Seq, compute: str) -> dict[str, Any]:
    """Return the description of a model for the native module; see `packed`.

    compute: type of the products, one of `choices.COMPUTE`.
    """
    config = model.config
    attention = model.decoder.attention
    bridge = model.bridge
    ends = ("_l0", "_l0_reverse") if config.bidirectional else ("_l0",)
    return {
        "compute": compute,
        "cell": config.cell,
        "residual": config.residual,
        "input_feeding": config.input_feeding,
        "embedding": model.target_embedding.weight.detach(),
        "layers": [packed.layer_spec(layer, "_l0") for layer in model.decoder.stack.layers],
        "attention": None if attention is None else packed.attention_spec(attention),
        "output_proj": _linear(model.output_proj)[0],
        "output_weight": model.output.weight.detach(),
        "output_bias": model.output.bias.detach(),
        "encoder": {
            "embedding": model.source_embedding.weight.detach(),
            "layers": [
                [packed.layer_spec(layer, end) for end in ends]
                for layer in model.encoder.stack.layers
            ],
            "reverse": model.encoder.reverse,
            "memory_proj": _linear(model.memory_proj)[0],
            "bridge": bridge.kind,
            "maps": [_linear(part) for part in bridge.maps] if hasattr(bridge, "maps") else [],
        },
    }


def _linear(part: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    if not isinstance(part, nn.Linear):
        return None, None
    return part.weight.detach(), None if part.bias is None else part.bias.detach()


class PackedModels:
    """Models packed for the native module: an immutable copy of their parameters.

    models: one, or an ensemble with the same vocabularies. compute: type of the products, one of
    `choices.COMPUTE`. Raises ValueError for what `not_native_reasons` names.
    """

    def __init__(self, models: Sequence[Seq2Seq], compute: str = "float32") -> None:
        if reasons := not_native_reasons(models):
            raise ValueError(f"these models cannot be decoded natively: {'; '.join(reasons)}")
        native = packed.native_module()
        self.compute = compute
        self._native = native
        self._models = [native.PackedModel(spec_of(model, compute)) for model in models]
        self._snapshots = [packed.Snapshot(model) for model in models]

    @property
    def bytes(self) -> int:
        """Size of the packed parameters."""
        return sum(model.bytes for model in self._models)

    def is_of(self, models: Sequence[Seq2Seq]) -> bool:
        """Whether these are the models that were packed, unchanged, and can be decoded natively.

        See `packed.Snapshot` for the changes that are seen.
        """
        return (
            len(models) == len(self._snapshots)
            and all(snap.module is own for snap, own in zip(self._snapshots, models, strict=True))
            and all(snapshot.is_current() for snapshot in self._snapshots)
            and not _reasons_of_now(models)
        )

    def search(
        self,
        source: Tensor,
        lengths: Tensor,
        limits: Tensor,
        config: SearchConfig,
        prefix: Tensor | None = None,
        return_weights: bool = False,
    ) -> list[list[Hypothesis]]:
        """Run `search.search` natively, with the same arguments and results.

        limits: int64 (B,), the largest target lengths.

        A draw depends on the seed, the position of its source in the batch and the step, but the
        symbols drawn are not those of the torch path.
        """
        options = {
            "most": config.most,
            "nbest_mass": config.nbest_mass or 0.0,
            "length_penalty": config.length_penalty,
            "alpha": config.alpha,
            "coverage_penalty": config.coverage_penalty,
            "min_length": config.min_length,
            "block_ngrams": config.block_ngrams,
            "sample": config.sample,
            "temperature": config.temperature,
            "top_k": config.top_k,
            "top_p": config.top_p,
            "seed": _seed(config),
            "return_weights": return_weights,
        }
        threads = torch.get_num_threads()
        try:
            found = self._native.search(
                self._models, source, lengths, limits, prefix, config.beam, options, threads
            )
        except self._native.NotNumbersError:
            raise not_numbers() from None
        return [[Hypothesis(*each) for each in hypotheses] for hypotheses in found]


def _seed(config: SearchConfig) -> int:
    """The seed of a call: ``config.seed``, or a number drawn from torch's generator."""
    if not config.sample:
        return 0
    if config.seed is None:
        return int(torch.randint(2**62, (), device="cpu"))
    return config.seed % 2**64  # torch takes negative seeds too
