"""A trained model at work: symbols in, symbols out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_attn import backends
from fused_attn.seq2seq import checkpoint
from fused_attn.seq2seq.batching import pad
from fused_attn.seq2seq.config import ModelConfig
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.model import Seq2Seq
from fused_attn.seq2seq.search import greedy_search
from fused_attn.seq2seq.vocabulary import UnknownSymbolError, Vocabulary

BATCH_SIZE = 256


@dataclass(frozen=True)
class Prediction:
    """What the model makes of one source."""

    source: tuple[str, ...]
    target: tuple[str, ...]
    weights: Tensor | None  # alignment (len(target), len(source)); None if not asked for


def require_backend(backend: str, score: str) -> None:
    """Raise `InputError` unless the backend can run a model with this score here."""
    try:
        backends.select("cpu", torch.float32, score, backends.check_request(backend))
    except ValueError as error:
        raise InputError(" ".join(str(error).split())) from None


def load_model(
    directory: Path, meta: dict[str, Any], *, backend: str = "auto"
) -> tuple[Seq2Seq, Vocabulary, Vocabulary]:
    """Return the model of a checkpoint with this metadata, and source and target vocabulary.

    Raises `InputError` if the checkpoint is damaged or the backend cannot run it.
    """
    parameters = checkpoint.load_tensors(directory, checkpoint.MODEL)
    try:
        source, target = Vocabulary(meta["source"]), Vocabulary(meta["target"])
        config = ModelConfig(**meta["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise checkpoint.damaged(directory, error) from None
    require_backend(backend, config.score)
    model = Seq2Seq(config, len(source), len(target), backend=backend)
    try:
        model.load_state_dict(parameters)
    except RuntimeError as error:  # names or shapes that do not fit
        raise checkpoint.damaged(directory, error) from None
    return model, source, target


class Predictor:
    """A model with its vocabularies."""

    def __init__(self, model: Seq2Seq, source: Vocabulary, target: Vocabulary) -> None:
        self.model = model
        self.source = source
        self.target = target

    @classmethod
    def load(cls, directory: Path, *, backend: str = "auto") -> Predictor:
        """Read a checkpoint; raises `InputError` if it is missing, damaged or of another format."""
        meta = checkpoint.load_metadata(directory)
        model, source, target = load_model(directory, meta, backend=backend)
        return cls(model.eval(), source, target)

    def encode(self, symbols: Sequence[str]) -> list[int]:
        """Return the numbers of a source; raises `InputError` if it is empty or not known."""
        if not symbols:
            raise InputError("there is no letter")
        try:
            return self.source.encode(symbols)
        except UnknownSymbolError as error:
            known = " ".join(self.source.symbols)
            raise InputError(f"unknown letter {error.symbol!r}; known are {known}") from None

    def predict(
        self, sources: Sequence[Sequence[str]], *, return_weights: bool = False
    ) -> list[Prediction]:
        """Return a prediction for each source, in the same order; raises as `encode`."""
        encoded = [self.encode(source) for source in sources]
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        found: dict[int, Prediction] = {}
        for start in range(0, len(order), BATCH_SIZE):
            chosen = order[start : start + BATCH_SIZE]  # about equally long
            tokens, lengths = pad([encoded[i] for i in chosen])
            hypotheses = greedy_search(self.model, tokens, lengths, return_weights=return_weights)
            for i, hypothesis in zip(chosen, hypotheses, strict=True):
                target = self.target.decode(hypothesis.tokens)
                found[i] = Prediction(tuple(sources[i]), target, hypothesis.weights)
        return [found[i] for i in range(len(encoded))]
