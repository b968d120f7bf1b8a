"""Predict targets for texts with a trained model or an ensemble."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set, Sized
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, overload

import torch

from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.checkpoints.export import save_model
from fused_attn.seq2seq.checkpoints.find import find_checkpoint
from fused_attn.seq2seq.checkpoints.load import load_model
from fused_attn.seq2seq.checkpoints.recipe import stored_bound, stored_task
from fused_attn.seq2seq.config import SearchConfig
from fused_attn.seq2seq.data.examples import pad
from fused_attn.seq2seq.errors import InputError, OptionError
from fused_attn.seq2seq.inference.engine import Engine, search_config
from fused_attn.seq2seq.inference.prediction import Prediction
from fused_attn.seq2seq.inference.sources import EncodedSource, Source, SourceReader
from fused_attn.seq2seq.model.modes import WithoutDraws
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.search.constraints import LengthBound
from fused_attn.seq2seq.search.hypothesis import Hypothesis
from fused_attn.seq2seq.search.packed import not_native_reasons
from fused_attn.seq2seq.tasks.base import Task
from fused_attn.seq2seq.tasks.text import Pairs, PairsConfig
from fused_attn.seq2seq.vocabulary import Vocabulary

BATCH_SIZE = 256

# Key in the metadata of a checkpoint.
_LONGEST = "longest_source"


class Predictor(SourceReader):
    """A model with its vocabularies and its task: ``predictor("hello")``.

    Several models form an ensemble, which averages their probabilities.

    Args:
        models: one, or several with the same vocabularies, on one device.
        source, target: the vocabularies.
        bound: bounds the length of targets.
        task: converts texts to source symbols, and target symbols to texts; None splits texts into
            words at white space.
        meta: additional metadata for checkpoints of the model, as JSON values.
        longest_source: number of symbols of the longest source that the models were trained on;
            None takes it from ``meta``, where it may be missing.
        compute, stored: types of the products of the native decoder; see `Engine`.
    """

    def __init__(
        self,
        models: Seq2Seq | Sequence[Seq2Seq],
        source: Vocabulary,
        target: Vocabulary,
        bound: LengthBound = LengthBound(),  # noqa: B008, it is frozen
        task: Task | None = None,
        meta: Mapping[str, Any] | None = None,
        longest_source: int | None = None,
        compute: str = "auto",
        stored: str = "float32",
    ) -> None:
        self.models = [models] if isinstance(models, Seq2Seq) else _checked(models)
        self._meta = dict(meta or {})
        known: int | None = self._meta.get(_LONGEST)
        sizes = (m.config.max_source for m in self.models if m.config.score == "location")
        super().__init__(
            source,
            _words(source, target) if task is None else task,
            known if longest_source is None else longest_source,
            min(filter(None, sizes), default=None),
        )
        self.source = source
        self.target = target
        self.bound = bound
        self._engine = Engine(self.models, bound, compute, stored)

    @property
    def compute(self) -> str | None:
        """Type of the products, "float32", "bfloat16" or "int8"; None if searches run in torch."""
        return None if self.not_native_reasons() else self._engine.compute

    def not_native_reasons(self) -> list[str]:
        """Return why searches run in torch instead of the native decoder; empty if they do not."""
        return not_native_reasons(self.models)

    @property
    def device(self) -> torch.device:
        """The device of the models."""
        return next(self.models[0].parameters()).device

    def __repr__(self) -> str:
        config = self.models[0].config
        ensemble = f"{len(self.models)} models, " if len(self.models) > 1 else ""
        encoder = f"{'bi' if config.bidirectional else ''}{config.cell}"
        return (
            f"Predictor({self.task.name}: {ensemble}{encoder}, hidden {config.hidden}, "
            f"attention {config.score}; {len(self.source.symbols)} source and "
            f"{len(self.target.symbols)} target symbols; on {self.device}, "
            f"{'in torch' if self.compute is None else f'native in {self.compute}'})"
        )

    @classmethod
    def load(
        cls,
        *models: str | Path,
        backend: str = "auto",
        device: torch.device | str = "auto",
        compute: str = "auto",
    ) -> Predictor:
        """Load a model, or the models of an ensemble; see `load`."""
        with WithoutDraws():
            return cls.drawn(*models, backend=backend, device=device, compute=compute)

    @classmethod
    def drawn(
        cls,
        *models: str | Path,
        backend: str = "auto",
        device: torch.device | str = "auto",
        compute: str = "auto",
    ) -> Predictor:
        """Like `load`, but draw from torch's generator, as creating a new model does.

        For runs with teachers: their random numbers depend on these draws.
        """
        if not models:
            raise TypeError("load needs the name or the path of a model")
        paths = [find_checkpoint(model) for model in models]
        metas = [files.load_metadata(path) for path in paths]
        loaded = [
            load_model(path, meta, backend=backend, device=device)
            for path, meta in zip(paths, metas, strict=True)
        ]
        try:
            bound = stored_bound(metas[0])
            longest = min(filter(None, map(_longest_source, metas)), default=None)
            task = stored_task(metas[0])
            stored = "int8" if all(map(files.is_int8, paths)) else "float32"
        except files.UNUSABLE as error:
            raise files.damaged(paths[0], error) from None
        (_, source, target), *others = loaded
        for path, (_, *vocabularies) in zip(paths[1:], others, strict=True):
            if [v.symbols for v in vocabularies] != [source.symbols, target.symbols]:
                raise InputError(f"the vocabularies of {path} differ from those of {paths[0]}")
        members = [model.eval() for model, _, _ in loaded]
        return cls(members, source, target, bound, task, metas[0], longest, compute, stored)

    def save(self, directory: str | Path, *, store: str = "float32") -> None:
        """Write the model as a checkpoint for `load`, without training state.

        directory: a directory that does not exist yet.
        store: dtype of the stored parameters, "float32", "float16" or "int8".

        Raises `InputError` if the directory exists, this is an ensemble or a parameter is not
        finite, OSError if it cannot be written.
        """
        if len(self.models) > 1:
            raise InputError(
                f"cannot save an ensemble of {len(self.models)} models as one checkpoint"
            )
        (model,) = self.models
        meta = {
            **self._meta,
            "model": asdict(model.config),
            "task": self.task.to_json(),
            "source": self.source.symbols,
            "target": self.target.symbols,
            "target_bound": asdict(self.bound),
            **({} if self.longest_source is None else {_LONGEST: self.longest_source}),
        }
        save_model(Path(directory), meta, model.state_dict(), store)

    @overload
    def __call__(
        self, texts: str, *, batch_size: int = ..., alignments: bool = ..., **search: Any
    ) -> Prediction: ...

    @overload
    def __call__(
        self,
        texts: list[Any] | tuple[Any, ...],
        *,
        batch_size: int = ...,
        alignments: bool = ...,
        **search: Any,
    ) -> list[Prediction]: ...

    @overload
    def __call__(
        self,
        texts: Iterable[Source],
        *,
        batch_size: int = ...,
        alignments: bool = ...,
        **search: Any,
    ) -> list[Prediction] | Iterator[Prediction]: ...

    def __call__(
        self,
        texts: str | Iterable[Source],
        *,
        batch_size: int = BATCH_SIZE,
        alignments: bool = True,
        **search: Any,
    ) -> Prediction | list[Prediction] | Iterator[Prediction]:
        """Predict the target of one text or of several texts.

        Args:
            texts: one text, which returns one `Prediction`; a list, or anything else that has a
                length, which returns a list in the same order; or an iterator, which returns an
                iterator that reads ``batch_size`` texts at a time. An element may also be a
                sequence of tokens.
            batch_size: number of texts decoded together. Results do not depend on it, except for
                rounding, and for the draws of ``sample=True``.
            alignments: whether predictions have their attention weights.
            search: fields of `SearchConfig`, such as ``beam=5, nbest=3``.

        Raises `InputError` that names the text if it is empty, or has a symbol that is unknown to a
        vocabulary without ``<unk>``; or if a search option has no effect without another one.
        Raises ValueError for the value of an option, TypeError for an unknown option. Warns once,
        with a UserWarning, if texts are longer than `longest_source`.
        """
        config = search_config(search)
        _check_options(batch_size, alignments)
        if isinstance(texts, str):
            sources = self.read_all([texts])
            self.warn_of_long(sources)
            return self.decode(sources, config, alignments=alignments)[0]
        if isinstance(texts, (bytes, Mapping, Set)) or not isinstance(texts, Iterable):
            kind = type(texts).__name__
            raise InputError(f"expected a text, a list of texts or an iterator, got {kind}")
        if not isinstance(texts, Sized):
            return self._stream(iter(texts), config, batch_size, alignments)
        sources = self.read_all(list(texts))
        self.warn_of_long(sources)
        return self.decode(sources, config, alignments=alignments, batch_size=batch_size)

    def _stream(
        self, texts: Iterator[Source], config: SearchConfig, batch_size: int, alignments: bool
    ) -> Iterator[Prediction]:
        before = 0
        warned = False
        while batch := list(islice(texts, batch_size)):
            sources = self.read_all(batch, before)
            warned = warned or self.warn_of_long(sources, before)
            yield from self.decode(sources, config, alignments=alignments)
            before += len(batch)

    def predict(
        self,
        sources: Sequence[Source],
        config: SearchConfig = SearchConfig(),  # noqa: B008, it is frozen
        *,
        prefixes: Sequence[Sequence[str]] | None = None,
        alignments: bool = False,
        batch_size: int = BATCH_SIZE,
    ) -> list[Prediction]:
        """Return the best prediction for each source, in the same order.

        sources: texts or sequences of tokens; a str means one text.
        prefixes: tokens that each target must begin with, one sequence per source.
        alignments: whether predictions have their attention weights.
        batch_size: number of sources decoded together.

        Raises `InputError` that names the source if it is empty, or has a symbol that is unknown to
        a vocabulary without ``<unk>``. Warns once, with a UserWarning, if sources are longer than
        `longest_source`.
        """
        read = self.read_all([sources] if isinstance(sources, str) else sources)
        self.warn_of_long(read)
        return self.decode(
            read, config, prefixes=prefixes, alignments=alignments, batch_size=batch_size
        )

    def decode(
        self,
        sources: Sequence[EncodedSource],
        config: SearchConfig = SearchConfig(),  # noqa: B008, it is frozen
        *,
        prefixes: Sequence[Sequence[str]] | None = None,
        alignments: bool = False,
        batch_size: int = BATCH_SIZE,
    ) -> list[Prediction]:
        """`predict` for sources that are read already. Never warns."""
        _check_options(batch_size, alignments)
        self._check_search(config, len(sources), prefixes)
        order = sorted(range(len(sources)), key=lambda i: len(sources[i].ids))
        found: dict[int, Prediction] = {}
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]  # of similar length
            prefix = None
            if prefixes is not None:
                prefix, _ = pad([self.target.encode(prefixes[i]) for i in chosen])
            encoded = [sources[i].ids for i in chosen]
            results = self._engine.search(encoded, config, prefix, alignments and self._attends)
            for i, hypotheses in zip(chosen, results, strict=True):
                found[i] = self._prediction(sources[i], hypotheses)
        return [found[i] for i in range(len(sources))]

    def _check_search(
        self, config: SearchConfig, count: int, prefixes: Sequence[Sequence[str]] | None
    ) -> None:
        if config.coverage_penalty and not self._attends:
            raise OptionError("coverage_penalty", "has no effect: the model has no attention")
        if prefixes is not None and len(prefixes) != count:
            raise ValueError(f"expected {count} prefixes, one per source, got {len(prefixes)}")

    @property
    def _attends(self) -> bool:
        return any(model.config.score != "none" for model in self.models)

    def _prediction(self, source: EncodedSource, hypotheses: Sequence[Hypothesis]) -> Prediction:
        others: tuple[Prediction, ...] = ()
        for hypothesis in reversed(hypotheses):
            tokens = self.target.decode(hypothesis.tokens)
            found = Prediction(
                source.tokens,
                tokens,
                self.task.write(tokens),
                hypothesis.log_prob,
                tuple(hypothesis.token_log_probs),
                hypothesis.score,
                # Not a view of its batch's weights, which it would keep alive.
                None if hypothesis.weights is None else hypothesis.weights.clone(),
                source_text=source.text,
            )
            others = (found, *others)
        first, *rest = others
        object.__setattr__(first, "others", tuple(rest))
        return first


def _checked(models: Sequence[Seq2Seq]) -> list[Seq2Seq]:
    found = list(models) if isinstance(models, Iterable) else [models]
    for model in found:
        if not isinstance(model, Seq2Seq):
            raise TypeError(f"models must be one or several Seq2Seq, got {type(model).__name__}")
    if not found:
        raise ValueError("models must have one model at least, got none")
    return found


def _words(source: Vocabulary, target: Vocabulary) -> Task:
    """The task of a model that was trained without one: words, in the form of its vocabularies."""
    symbols = (*source.symbols, *target.symbols)
    is_composed = all(unicodedata.is_normalized("NFC", symbol) for symbol in symbols)
    return Pairs(PairsConfig(normalization="NFC" if is_composed else None))


def _longest_source(meta: Mapping[str, Any]) -> int | None:
    """The length of the longest training source in metadata, None if it is not known."""
    value = meta.get(_LONGEST)
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"{_LONGEST} must be a positive whole number, got {value!r}")
    return value


def _check_options(batch_size: int, alignments: bool) -> None:
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive int, got {batch_size!r}")
    if not isinstance(alignments, bool):
        raise TypeError(f"alignments must be True or False, got {alignments!r}")


def load(
    *models: str | Path,
    backend: str = "auto",
    device: torch.device | str = "auto",
    compute: str = "auto",
) -> Predictor:
    """Load a model. Several names load an ensemble, which averages the models' probabilities.

    Args:
        models: a bundled model ("g2p"), the directory of a run (its best checkpoint is loaded), a
            checkpoint, or an exported model.
        backend: backend of the attention, "auto" or a name; see ``fused-attn info``. Any but "auto"
            and "cpu" keeps searches in torch.
        device: "cpu", "cuda", "cuda:1" ..., or "auto" for a GPU if there is one.
        compute: type of the products on a CPU, "float32", "bfloat16" or "int8". "auto" takes int8
            for a model that is stored in it (for an ensemble, if all are), else float32. Scores
            differ a little from type to type; they and the alignments are float32 in each.

    Raises `InputError` if a model is missing, damaged or of another format version, if the
    vocabularies of an ensemble differ, if the device or the backend is not available, or if
    ``compute`` is given and the native decoder cannot be used, as on a GPU.
    """
    return Predictor.load(*models, backend=backend, device=device, compute=compute)
