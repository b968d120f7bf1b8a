"""RNN sequence-to-sequence models with attention: train, load, predict.

    from fused_attn import seq2seq

    model = seq2seq.load("g2p")                  # a bundled model, a run or a checkpoint
    model("hello").text                          # "HH EH L OW"
    model = seq2seq.fit(pairs, output="runs/own")
    model.save("my-model")

With your own training loop, use `Seq2Seq`, `ModelConfig`, `Vocabulary` and `Predictor`; with the
toolkit's loop, `Trainer`, `TrainingConfig` and `Examples`. The command ``fused-attn`` is a thin
layer over these.

Names are imported on first use, so that the command line can answer ``--help`` without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fused_attn.seq2seq.config import ModelConfig, SearchConfig, TrainingConfig
    from fused_attn.seq2seq.data.examples import Batch, Examples
    from fused_attn.seq2seq.errors import InputError
    from fused_attn.seq2seq.inference.evaluate import evaluate
    from fused_attn.seq2seq.inference.prediction import Prediction
    from fused_attn.seq2seq.inference.predictor import Predictor, load
    from fused_attn.seq2seq.metrics import (
        ErrorRates,
        alignment_error_rate,
        edit_distance,
        error_rates,
    )
    from fused_attn.seq2seq.model.seq2seq import Seq2Seq
    from fused_attn.seq2seq.training.fit import fit
    from fused_attn.seq2seq.training.trainer import Trainer
    from fused_attn.seq2seq.vocabulary import BOS, EOS, PAD, Vocabulary

_HOME = {
    "BOS": "vocabulary",
    "Batch": "data.examples",
    "EOS": "vocabulary",
    "ErrorRates": "metrics",
    "Examples": "data.examples",
    "InputError": "errors",
    "ModelConfig": "config",
    "PAD": "vocabulary",
    "Prediction": "inference.prediction",
    "Predictor": "inference.predictor",
    "SearchConfig": "config",
    "Seq2Seq": "model.seq2seq",
    "Trainer": "training.trainer",
    "TrainingConfig": "config",
    "Vocabulary": "vocabulary",
    "alignment_error_rate": "metrics",
    "edit_distance": "metrics",
    "error_rates": "metrics",
    "evaluate": "inference.evaluate",
    "fit": "training.fit",
    "load": "inference.predictor",
}

__all__ = [
    "BOS",
    "EOS",
    "PAD",
    "Batch",
    "ErrorRates",
    "Examples",
    "InputError",
    "ModelConfig",
    "Prediction",
    "Predictor",
    "SearchConfig",
    "Seq2Seq",
    "Trainer",
    "TrainingConfig",
    "Vocabulary",
    "alignment_error_rate",
    "edit_distance",
    "error_rates",
    "evaluate",
    "fit",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fused_attn.seq2seq' has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # the next access no longer comes here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
