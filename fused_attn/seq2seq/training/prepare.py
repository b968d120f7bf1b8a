"""What starting and resuming a run share: the machine, the data, the evaluation of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric

from fused_attn.seq2seq.checkpoints.recipe import START_FROM, TEACHER, Recipe
from fused_attn.seq2seq.data.examples import Examples
from fused_attn.seq2seq.data.pairs import Data, Item, Symbols
from fused_attn.seq2seq.errors import InputError, OptionError
from fused_attn.seq2seq.inference.evaluate import measures, perplexity, targets
from fused_attn.seq2seq.inference.predictor import Predictor
from fused_attn.seq2seq.metrics import PERPLEXITY
from fused_attn.seq2seq.search.constraints import LengthBound
from fused_attn.seq2seq.tasks.base import Task
from fused_attn.seq2seq.training.directory import PAIRS
from fused_attn.seq2seq.training.processes import gathered
from fused_attn.seq2seq.training.progress import NoProgress, Progress
from fused_attn.seq2seq.training.run import Run
from fused_attn.seq2seq.training.trainer import Trainer
from fused_attn.seq2seq.vocabulary import UnknownSymbolError

_ITEMS_AT_ONCE = 1024  # development items between two checks for a stop signal


@dataclass(frozen=True)
class Machine:
    """How a run is executed. This does not change its results, except for rounding.

    fabric: of this process.
    backend: backend of the attention, "auto" or a name.
    on_disk: whether to keep the encoded pairs in the run's directory instead of in memory.
    tensorboard: whether to write events for TensorBoard.
    """

    fabric: Fabric
    backend: str = "auto"
    on_disk: bool = False
    tensorboard: bool = False


def check_recipe(recipe: Recipe) -> None:
    """Raise `OptionError` if an option of the training has no effect on the model."""
    if recipe.training.rdrop and not recipe.model.dropout:
        raise OptionError("rdrop", "needs a dropout above 0: without it both passes are the same")
    for name in ("coverage_loss", "guided"):
        if getattr(recipe.training, name) and recipe.model.score == "none":
            raise OptionError(name, "needs a --score other than none")


def load_data(
    directory: Path, recipe: Recipe, machine: Machine, adapt: Callable[[Data], Data]
) -> tuple[Recipe, Data, Examples]:
    """Load and encode the data. The first process goes ahead: it learns subwords and writes files.

    adapt: applied to the loaded data; sets the vocabularies of an existing model, for example.
    """
    fabric, task = machine.fabric, recipe.task
    path = directory / PAIRS if machine.on_disk else None
    links = bool(recipe.training.guided)
    data: Data | None = None
    if fabric.is_global_zero:
        data = adapt(task.load(links=links))
        if path is not None:
            _write(data, path)
    learned = task.updated(gathered(fabric, task.to_json())[0])
    if data is None:
        data = adapt(learned.load(links=links))
    examples = _encode(data, None) if path is None else Examples.open(path)
    if not len(examples):
        raise InputError("there are no pairs to train on")
    if recipe.training.guided and not examples.has_links:
        raise OptionError("guided", "needs alignment links, and no training pair has any")
    return replace(recipe, task=learned), data, examples


def _write(data: Data, directory: Path) -> None:
    """Write the encoded pairs to ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    _encode(data, directory)


def _encode(data: Data, directory: Path | None) -> Examples:
    pairs = (
        (data.source.encode(pair.source), data.target.encode(pair.target), pair.links)
        for pair in data.train
    )
    try:
        return Examples.collect(pairs, directory)
    except UnknownSymbolError as error:
        raise InputError(
            f"the training pairs contain the symbol {error.symbol!r}, which is not in the "
            "vocabulary of the model"
        ) from None


def _length_bound(examples: Examples) -> LengthBound:
    """The length bound for predictions: 99.9 % of the training pairs are within its ratio."""
    targets = examples.target_lengths - 2  # BOS and EOS
    ratios = targets / examples.source_lengths
    rank = max(1, math.ceil(0.999 * len(ratios)))
    return LengthBound(ratios.kthvalue(rank).values.item(), int(targets.max()))


def metadata(
    recipe: Recipe,
    data: Data,
    examples: Examples,
    start_from: str | None,
    teachers: Sequence[str],
) -> dict[str, Any]:
    """Return the metadata for the checkpoints of a run, as JSON values."""
    return {
        **recipe.to_json(),
        "source": data.source.symbols,
        "target": data.target.symbols,
        "training_pairs": data.fingerprint,
        "dev_pairs": data.dev_fingerprint,
        "longest_source": int(examples.source_lengths.max()),
        "target_bound": asdict(_length_bound(examples)),
        START_FROM: start_from,
        TEACHER: list(teachers),
    }


def make_run(
    directory: Path,
    trainer: Trainer,
    meta: dict[str, Any],
    task: Task,
    data: Data,
    progress: Progress,
    machine: Machine,
) -> Run:
    """Return the run of a trainer, which evaluates on the development set of the data."""
    bound = LengthBound(**meta["target_bound"])
    predictor = Predictor(trainer.model, data.source, data.target, bound, task)

    def evaluate(should_stop: Callable[[], bool]) -> dict[str, float] | None:
        trainer.model.eval()
        if task.by_perplexity:
            return None if should_stop() else {PERPLEXITY: perplexity(predictor, data.dev)}
        return _by_targets(task, predictor, data.dev, machine.fabric, should_stop)

    shown = progress if machine.fabric.is_global_zero else NoProgress()
    return Run(directory, trainer, meta, evaluate, shown, machine.tensorboard)


def _by_targets(
    task: Task,
    predictor: Predictor,
    items: Sequence[Item],
    fabric: Fabric,
    should_stop: Callable[[], bool],
) -> dict[str, float] | None:
    """The metrics of the predicted targets. Each process predicts its share of the items."""
    found: list[Symbols] = []
    for start in range(0, len(items), _ITEMS_AT_ONCE):
        if should_stop():
            return None
        chunk = items[start : start + _ITEMS_AT_ONCE]
        parts = gathered(fabric, targets(predictor, chunk[fabric.global_rank :: fabric.world_size]))
        found += [parts[i % len(parts)][i // len(parts)] for i in range(len(chunk))]
    return measures(task, found, items)
