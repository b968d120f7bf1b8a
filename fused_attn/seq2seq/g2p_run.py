"""Training and judging a model of pronunciations: the dictionary meets the toolkit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fused_attn.seq2seq import checkpoint, g2p
from fused_attn.seq2seq.batching import Examples
from fused_attn.seq2seq.config import ModelConfig, SearchConfig, TrainingConfig
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.inference import Predictor, load_model, require_backend
from fused_attn.seq2seq.metrics import ErrorRates, error_rates
from fused_attn.seq2seq.model import Seq2Seq
from fused_attn.seq2seq.progress import Progress
from fused_attn.seq2seq.runs import Run, last_checkpoint
from fused_attn.seq2seq.training import Trainer
from fused_attn.seq2seq.vocabulary import Vocabulary

TASK = "g2p"

_WORDS_AT_ONCE = 1024  # of the development set, before a look at whether to stop


@dataclass(frozen=True)
class TaskConfig:
    """Which words are trained on.

    test_words: words to keep for the test; None to choose them by hash.
    limit_words: use only so many words for training and development; None for all.
    """

    test_words: tuple[str, ...] | None = None
    limit_words: int | None = None

    def __post_init__(self) -> None:
        if self.limit_words is not None and self.limit_words < 1:
            raise ValueError(f"limit_words must be a positive number, got {self.limit_words}")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the numbers of a run."""

    model: ModelConfig
    training: TrainingConfig
    task: TaskConfig

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as JSON values."""
        return {**asdict(self), "task": {"name": TASK, **asdict(self.task)}}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Recipe:
        """Return the recipe of a checkpoint; KeyError, TypeError or ValueError if it is none."""
        task = dict(values["task"])
        if task.pop("name") != TASK:
            raise ValueError(f"its task is {values['task']['name']}, not {TASK}")
        if task["test_words"] is not None:
            task["test_words"] = tuple(task["test_words"])
        return cls(
            ModelConfig(**values["model"]), TrainingConfig(**values["training"]), TaskConfig(**task)
        )


def load_recipe(directory: Path, meta: dict[str, Any]) -> Recipe:
    """Return the recipe of a checkpoint with this metadata; raises `InputError`."""
    try:
        return Recipe.from_json(meta)
    except (KeyError, TypeError, ValueError) as error:
        raise checkpoint.damaged(directory, error) from None


@dataclass(frozen=True)
class _Data:
    """What a recipe makes of the dictionary."""

    lexicon: g2p.Lexicon
    split: g2p.Split
    source: Vocabulary
    target: Vocabulary
    examples: Examples
    fingerprint: str  # of the training pairs

    @classmethod
    def load(cls, task: TaskConfig) -> _Data:
        lexicon = g2p.load_dictionary()
        split = g2p.split_words(lexicon, task.test_words, task.limit_words)
        source, target = Vocabulary(g2p.LETTERS), Vocabulary(g2p.phones(lexicon))
        pairs = [(word, variant) for word in split.train for variant in lexicon[word]]
        examples = Examples(
            [source.encode(word) for word, _ in pairs],
            [target.encode(variant) for _, variant in pairs],
        )
        fingerprint = hashlib.sha256(repr(pairs).encode()).hexdigest()
        return cls(lexicon, split, source, target, examples, fingerprint)


def start(directory: Path, recipe: Recipe, progress: Progress, backend: str = "auto") -> Run:
    """Return a new run, its first checkpoint written.

    Raises `InputError` if the data cannot be had or the backend cannot run the model, OSError if
    the directory cannot be written.
    """
    require_backend(backend, recipe.model.score)
    data = _Data.load(recipe.task)
    torch.manual_seed(recipe.training.seed)
    try:
        model = Seq2Seq(recipe.model, len(data.source), len(data.target), backend=backend)
    except ValueError as error:
        raise InputError(f"--{error}") from None
    trainer = Trainer(model, data.examples, recipe.training)
    meta = {
        **recipe.to_json(),
        "source": data.source.symbols,
        "target": data.target.symbols,
        "training_pairs": data.fingerprint,
    }
    run = _make_run(directory, trainer, meta, data, progress)
    run.start()
    return run


def resume(directory: Path, progress: Progress, backend: str = "auto") -> Run:
    """Return the run in ``directory`` as its last checkpoint left it.

    Raises `InputError` if there is no checkpoint, or it is damaged, or the dictionary has changed.
    """
    last = last_checkpoint(directory)
    meta = checkpoint.load_metadata(last)
    recipe = load_recipe(last, meta)
    data = _Data.load(recipe.task)
    if data.fingerprint != meta.get("training_pairs"):
        raise InputError(f"{directory} was trained on another version of the dictionary")
    model, _, _ = load_model(last, meta, backend=backend)
    trainer = Trainer(model, data.examples, recipe.training)
    tensors = checkpoint.load_tensors(last, checkpoint.TRAINING)
    try:
        trainer.load_state(meta["position"], tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise checkpoint.damaged(last, error) from None
    kept = ("model", "training", "task", "source", "target", "training_pairs")
    return _make_run(directory, trainer, {key: meta[key] for key in kept}, data, progress)


def _make_run(
    directory: Path, trainer: Trainer, meta: dict[str, Any], data: _Data, progress: Progress
) -> Run:
    predictor = Predictor([trainer.model], data.source, data.target)
    words, lexicon = data.split.dev, data.lexicon

    def evaluate(should_stop: Callable[[], bool]) -> dict[str, float] | None:
        trainer.model.eval()
        found: list[g2p.Pronunciation] = []
        while len(found) < len(words):
            if should_stop():
                return None
            found += pronounce(predictor, words[len(found) :][:_WORDS_AT_ONCE])
        return rates(judge(found, words, lexicon))

    return Run(directory, trainer, meta, evaluate, progress)


def pronounce(
    predictor: Predictor,
    words: Sequence[str],
    config: SearchConfig = SearchConfig(),  # noqa: B008, it is frozen
) -> list[g2p.Pronunciation]:
    """Return the model's pronunciation of each word."""
    return [prediction.target for prediction in predictor.best(words, config)]


def judge(
    found: Sequence[g2p.Pronunciation], words: Sequence[str], lexicon: g2p.Lexicon
) -> ErrorRates:
    """Compare pronunciations with the dictionary's, of which the nearest counts."""
    return error_rates(
        (pronunciation, lexicon[word]) for pronunciation, word in zip(found, words, strict=True)
    )


def rates(errors: ErrorRates) -> dict[str, float]:
    """Return word and phone error rate by name."""
    return {"WER": errors.sequence_error_rate, "PER": errors.symbol_error_rate}
