"""Training and judging a model of a task: the data meets the toolkit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fused_attn.seq2seq import checkpoint
from fused_attn.seq2seq.batching import Examples
from fused_attn.seq2seq.config import ModelConfig, SearchConfig, TrainingConfig
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.inference import Predictor, load_model, require_backend
from fused_attn.seq2seq.metrics import ErrorRates, error_rates
from fused_attn.seq2seq.model import Seq2Seq
from fused_attn.seq2seq.progress import Progress
from fused_attn.seq2seq.runs import Run, last_checkpoint
from fused_attn.seq2seq.tasks import Data, Item, Symbols, Task, make_task
from fused_attn.seq2seq.training import Trainer

_ITEMS_AT_ONCE = 1024  # of the development set, before a look at whether to stop


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the numbers of a run."""

    model: ModelConfig
    training: TrainingConfig
    task: Task

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as JSON values."""
        return {
            "model": asdict(self.model),
            "training": asdict(self.training),
            "task": self.task.to_json(),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Recipe:
        """Return the recipe of a checkpoint; KeyError, TypeError or ValueError if it is none."""
        return cls(
            ModelConfig(**values["model"]),
            TrainingConfig(**values["training"]),
            make_task(values["task"]),
        )


def load_recipe(directory: Path, meta: dict[str, Any]) -> Recipe:
    """Return the recipe of a checkpoint with this metadata; raises `InputError`."""
    try:
        return Recipe.from_json(meta)
    except (KeyError, TypeError, ValueError) as error:
        raise checkpoint.damaged(directory, error) from None


def start(
    directory: Path,
    recipe: Recipe,
    progress: Progress,
    backend: str = "auto",
    note: Callable[[str], None] = lambda text: None,
) -> Run:
    """Return a new run, its first checkpoint written. ``note`` is told what is odd in the data.

    Raises `InputError` if the data cannot be had or the backend cannot run the model, OSError if
    the directory cannot be written.
    """
    require_backend(backend, recipe.model.score)
    data = recipe.task.load()
    for text in data.notes:
        note(text)
    torch.manual_seed(recipe.training.seed)
    try:
        model = Seq2Seq(recipe.model, len(data.source), len(data.target), backend=backend)
    except ValueError as error:
        raise InputError(f"--{error}") from None
    trainer = Trainer(model, examples_of(data), recipe.training)
    meta = {
        **recipe.to_json(),
        "source": data.source.symbols,
        "target": data.target.symbols,
        "training_pairs": data.fingerprint,
    }
    run = _make_run(directory, trainer, meta, recipe.task, data, progress)
    run.start()
    return run


def examples_of(data: Data) -> Examples:
    """The training pairs as numbers."""
    return Examples(
        [data.source.encode(source) for source, _ in data.train],
        [data.target.encode(target) for _, target in data.train],
    )


def resume(directory: Path, progress: Progress, backend: str = "auto") -> Run:
    """Return the run in ``directory`` as its last checkpoint left it.

    Raises `InputError` if there is no checkpoint, or it is damaged, or the data has changed.
    """
    last = last_checkpoint(directory)
    meta = checkpoint.load_metadata(last)
    recipe = load_recipe(last, meta)
    data = recipe.task.load()
    if data.fingerprint != meta.get("training_pairs"):
        raise InputError(f"{directory} was trained on other data: the training pairs have changed")
    model, _, _ = load_model(last, meta, backend=backend)
    trainer = Trainer(model, examples_of(data), recipe.training)
    tensors = checkpoint.load_tensors(last, checkpoint.TRAINING)
    try:
        trainer.load_state(meta["position"], tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise checkpoint.damaged(last, error) from None
    kept = ("model", "training", "task", "source", "target", "training_pairs")
    meta = {key: meta[key] for key in kept}
    return _make_run(directory, trainer, meta, recipe.task, data, progress)


def _make_run(
    directory: Path,
    trainer: Trainer,
    meta: dict[str, Any],
    task: Task,
    data: Data,
    progress: Progress,
) -> Run:
    predictor = Predictor([trainer.model], data.source, data.target)

    def evaluate(should_stop: Callable[[], bool]) -> dict[str, float] | None:
        trainer.model.eval()
        found: list[Symbols] = []
        while len(found) < len(data.dev):
            if should_stop():
                return None
            found += targets(predictor, data.dev[len(found) :][:_ITEMS_AT_ONCE])
        return rates(task, judge(found, data.dev))

    return Run(directory, trainer, meta, evaluate, progress)


def targets(
    predictor: Predictor,
    items: Sequence[Item],
    config: SearchConfig = SearchConfig(),  # noqa: B008, it is frozen
) -> list[Symbols]:
    """Return the models' best target for each item."""
    return [found.target for found in predictor.best([item.source for item in items], config)]


def judge(found: Sequence[Symbols], items: Sequence[Item]) -> ErrorRates:
    """Compare targets with the items' references, of which the nearest counts."""
    return error_rates((target, i.references) for target, i in zip(found, items, strict=True))


def rates(task: Task, errors: ErrorRates) -> dict[str, float]:
    """Return the error rates by the task's names."""
    found = (errors.sequence_error_rate, errors.symbol_error_rate)
    return dict(zip(task.rates, found, strict=True))
