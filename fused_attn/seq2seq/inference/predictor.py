"""A trained model at work: symbols in, symbols out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.checkpoints.load import load_model
from fused_attn.seq2seq.config import SearchConfig
from fused_attn.seq2seq.data.examples import pad
from fused_attn.seq2seq.devices import moved
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.search.constraints import LengthBound
from fused_attn.seq2seq.search.hypothesis import Hypothesis
from fused_attn.seq2seq.search.search import search
from fused_attn.seq2seq.vocabulary import UnknownSymbolError, Vocabulary

BATCH_SIZE = 256


@dataclass(frozen=True)
class Prediction:
    """A target that was found for a source."""

    source: tuple[str, ...]
    target: tuple[str, ...]
    weights: Tensor | None  # alignment (len(target), len(source)); None if not asked for
    log_prob: float = 0.0  # of the target, in nats
    score: float = 0.0  # with the penalties of the search


class Predictor:
    """Models with their vocabularies: one, or several that decide together, on one device.

    bound: of the lengths of targets.
    """

    def __init__(
        self,
        models: Sequence[Seq2Seq],
        source: Vocabulary,
        target: Vocabulary,
        bound: LengthBound = LengthBound(),  # noqa: B008, it is frozen
    ) -> None:
        self.models = list(models)
        self.source = source
        self.target = target
        self.bound = bound

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return next(self.models[0].parameters()).device

    @classmethod
    def load(
        cls, *directories: Path, backend: str = "auto", device: torch.device | str = "auto"
    ) -> Predictor:
        """Read one checkpoint, or those of an ensemble, whose first has the bound.

        device: where the models go, "cpu", "cuda", "cuda:1" ..., or "auto", a GPU if there is one.

        Raises `InputError` if one is missing, damaged or of another format, if they have not the
        same vocabularies, or if the device is not there.
        """
        loaded = []
        metas = [files.load_metadata(directory) for directory in directories]
        for directory, meta in zip(directories, metas, strict=True):
            loaded.append(load_model(directory, meta, backend=backend, device=device))
        try:
            bound = LengthBound(**metas[0].get("target_bound", {}))
        except TypeError as error:
            raise files.damaged(directories[0], error) from None
        (_, source, target), *others = loaded
        for directory, (_, *vocabularies) in zip(directories[1:], others, strict=True):
            if [v.symbols for v in vocabularies] != [source.symbols, target.symbols]:
                raise InputError(f"{directory} has other vocabularies than {directories[0]}")
        return cls([model.eval() for model, _, _ in loaded], source, target, bound)

    def encode(self, symbols: Sequence[str]) -> list[int]:
        """Return the numbers of a source; raises `InputError` if it is empty or not known."""
        if not symbols:
            raise InputError("the source is empty")
        try:
            return self.source.encode(symbols)
        except UnknownSymbolError as error:
            known = " ".join(self.source.symbols)
            raise InputError(f"unknown symbol {error.symbol!r}; known are {known}") from None

    def predict(
        self,
        sources: Sequence[Sequence[str]],
        config: SearchConfig = SearchConfig(),  # noqa: B008, it is frozen
        *,
        prefixes: Sequence[Sequence[str]] | None = None,
        return_weights: bool = False,
    ) -> list[list[Prediction]]:
        """Return the predictions for each source, in the same order, of each the best first.

        prefixes: what each target begins with. Raises as `encode`.
        """
        encoded = [self.encode(source) for source in sources]
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        found: dict[int, list[Prediction]] = {}
        for start in range(0, len(order), BATCH_SIZE):
            chosen = order[start : start + BATCH_SIZE]  # about equally long
            tokens, lengths = pad([encoded[i] for i in chosen])
            prefix = None
            if prefixes is not None:
                prefix, _ = pad([self.target.encode(prefixes[i]) for i in chosen])
            results = search(
                self.models,
                moved(tokens, self.device),
                lengths,
                config,
                prefix=None if prefix is None else moved(prefix, self.device),
                bound=self.bound,
                return_weights=return_weights,
            )
            for i, hypotheses in zip(chosen, results, strict=True):
                found[i] = [self._prediction(sources[i], h) for h in hypotheses]
        return [found[i] for i in range(len(encoded))]

    def best(
        self,
        sources: Sequence[Sequence[str]],
        config: SearchConfig = SearchConfig(),  # noqa: B008
        *,
        return_weights: bool = False,
    ) -> list[Prediction]:
        """Return the best prediction for each source; see `predict`."""
        return [found[0] for found in self.predict(sources, config, return_weights=return_weights)]

    def _prediction(self, source: Sequence[str], hypothesis: Hypothesis) -> Prediction:
        target = self.target.decode(hypothesis.tokens)
        scores = (hypothesis.log_prob, hypothesis.score)
        return Prediction(tuple(source), target, hypothesis.weights, *scores)
