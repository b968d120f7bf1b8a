"""Start or resume a run: load the data, build the model and the trainer."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.checkpoints.find import find_checkpoint, last_checkpoint
from fused_attn.seq2seq.checkpoints.load import load_model, load_vocabularies, require_backend
from fused_attn.seq2seq.checkpoints.recipe import START_FROM, TEACHER, Recipe, load_recipe
from fused_attn.seq2seq.data.examples import Examples
from fused_attn.seq2seq.data.pairs import Data, Item, Symbols
from fused_attn.seq2seq.errors import InputError, OptionError
from fused_attn.seq2seq.inference.evaluate import measures, perplexity, targets
from fused_attn.seq2seq.inference.predictor import Predictor
from fused_attn.seq2seq.metrics import PERPLEXITY
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.model.widen import can_grow, grown
from fused_attn.seq2seq.search.constraints import LengthBound
from fused_attn.seq2seq.tasks.base import Task
from fused_attn.seq2seq.tasks.text import Pairs
from fused_attn.seq2seq.training import distillation
from fused_attn.seq2seq.training.processes import gathered
from fused_attn.seq2seq.training.progress import NoProgress, Progress
from fused_attn.seq2seq.training.run import PAIRS, Run
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


def start_run(
    directory: Path,
    recipe: Recipe,
    progress: Progress,
    machine: Machine,
    note: Callable[[str], None] = lambda text: None,
    start_from: str | Path | None = None,
    teachers: Sequence[str | Path] = (),
) -> Run:
    """Start a run: write its first checkpoint and return it.

    note: called with remarks for the user, such as how many lines of the data were skipped.
    start_from: a model whose parameters and vocabularies the run starts with.
    teachers: models whose probabilities the run learns besides the data.

    Raises `InputError` if the data cannot be read, the backend cannot run the model, or
    ``start_from`` or a teacher does not match them; OSError if the directory cannot be written.
    """
    with _nothing_left(directory, machine.fabric):
        return _start(directory, recipe, progress, machine, note, start_from, teachers)


@contextmanager
def _nothing_left(directory: Path, fabric: Fabric) -> Iterator[None]:
    """Remove what a failed start has written into a directory that was empty, or did not exist."""
    existed, was_new = directory.exists(), is_new(directory)
    try:
        yield
    except BaseException:
        if fabric.is_global_zero and was_new and directory.is_dir():
            for path in directory.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if not existed:
                directory.rmdir()
        raise


def is_new(directory: Path) -> bool:
    """Whether a run may start in a directory: it does not exist, or is empty."""
    return not directory.exists() or (directory.is_dir() and not any(directory.iterdir()))


def _start(
    directory: Path,
    recipe: Recipe,
    progress: Progress,
    machine: Machine,
    note: Callable[[str], None],
    start_from: str | Path | None,
    teachers: Sequence[str | Path],
) -> Run:
    require_backend(machine.backend, recipe.model.score, machine.fabric.device)
    if recipe.training.rdrop and not recipe.model.dropout:
        raise OptionError("rdrop", "needs a dropout above 0: without it both passes are the same")
    for name in ("coverage_loss", "guided"):
        if getattr(recipe.training, name) and recipe.model.score == "none":
            raise OptionError(name, "needs a --score other than none")
    origin = None if start_from is None else find_checkpoint(start_from)

    def with_known_vocabularies(data: Data) -> Data:
        if origin is None:
            return data
        known = load_vocabularies(origin, files.load_metadata(origin))
        return recipe.task.with_vocabularies(data, *known)

    recipe, data, examples = _load(directory, recipe, machine, with_known_vocabularies)
    for text in data.notes:
        note(text)
    longest, most = int(examples.source_lengths.max()), recipe.model.max_source
    if recipe.model.score == "location" and most is not None and longest > most:
        raise OptionError("max_source", f"is {most}, and a source has {longest} symbols")
    torch.manual_seed(recipe.training.seed)
    sizes = len(data.source), len(data.target)
    try:
        model = Seq2Seq(recipe.model, *sizes, backend=machine.backend)
    except ValueError as error:
        name, _, reason = str(error).partition(" ")
        raise OptionError(name, reason) from None
    if origin is not None:
        _initialise_from(model, origin)
    if teachers:
        _run_teachers(teachers, data, examples, directory, machine, note)
    trainer = Trainer(model, examples, recipe.training, machine.fabric)
    if rank := machine.fabric.global_rank:  # dropout differs between processes
        torch.manual_seed(recipe.training.seed + rank)
    meta = {
        **recipe.to_json(),
        "source": data.source.symbols,
        "target": data.target.symbols,
        "training_pairs": data.fingerprint,
        "target_bound": asdict(_bound(examples)),
        START_FROM: None if start_from is None else str(start_from),
        TEACHER: [str(teacher) for teacher in teachers],
    }
    run = _make_run(directory, trainer, meta, recipe.task, data, progress, machine)
    run.start()
    return run


def _initialise_from(model: Seq2Seq, origin: Path) -> None:
    """Load the parameters of a checkpoint, whose model may be narrower; see `widen`."""
    parameters = files.load_tensors(origin, files.MODEL)
    before = load_recipe(origin, files.load_metadata(origin)).model
    try:
        if can_grow(before, model.config):
            parameters = grown(before, parameters, model.config, model.state_dict())
        model.load_state_dict(parameters)
    except (KeyError, ValueError) as error:
        raise files.damaged(origin, error) from None
    except RuntimeError as error:  # names or shapes of parameters do not match
        reason = " ".join(str(error).split())
        raise OptionError("start_from", f": {origin} has another shape: {reason}") from None


def _run_teachers(
    teachers: Sequence[str | Path],
    data: Data,
    examples: Examples,
    directory: Path,
    machine: Machine,
    note: Callable[[str], None],
) -> None:
    """Set the soft targets of the examples. The first process computes and writes them."""
    fabric = machine.fabric
    if fabric.is_global_zero:
        paths = [find_checkpoint(teacher) for teacher in teachers]
        ensemble = Predictor.drawn(*paths, backend=machine.backend, device=fabric.device)
        for name, theirs, ours in (
            ("source", ensemble.source, data.source),
            ("target", ensemble.target, data.target),
        ):
            if theirs.symbols != ours.symbols:
                raise OptionError(
                    "teacher",
                    f": the {name} vocabulary of {paths[0]} differs from that of the data",
                )
        models = "1 teacher" if len(paths) == 1 else f"{len(paths)} teachers"
        note(f"running {models} over {len(examples):,} pairs first")
        table = distillation.soft_targets(ensemble.models, examples)
        directory.mkdir(parents=True, exist_ok=True)
        distillation.save(table, directory)
    gathered(fabric, None)
    examples.soft_targets = distillation.load(directory, examples)


def _load(
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


def _bound(examples: Examples) -> LengthBound:
    """The length bound for predictions: 99.9 % of the training pairs are within its ratio."""
    targets = examples.target_lengths - 2  # BOS and EOS
    ratios = targets / examples.source_lengths
    rank = max(1, math.ceil(0.999 * len(ratios)))
    return LengthBound(ratios.kthvalue(rank).values.item(), int(targets.max()))


def resume_run(
    directory: Path,
    progress: Progress,
    machine: Machine,
    given: Mapping[str, Sequence[Any]] | None = None,
) -> Run:
    """Resume the run in ``directory`` from its last checkpoint.

    given: the pairs, if the run was started with pairs given in Python; see `Pairs`.

    Raises `InputError` if there is no checkpoint, it is damaged, or the training pairs have
    changed.
    """
    last = last_checkpoint(directory)
    meta = files.load_metadata(last)
    before = load_recipe(last, meta)
    if isinstance(before.task, Pairs):
        before.task.given = dict(given or {})

    def with_known_vocabularies(data: Data) -> Data:
        if data.fingerprint != meta.get("training_pairs"):
            raise InputError(
                f"cannot resume {directory}: the training pairs have changed since it was started"
            )
        return before.task.with_vocabularies(data, *load_vocabularies(last, meta))

    recipe, data, examples = _load(directory, before, machine, with_known_vocabularies)
    if meta.get(TEACHER):
        examples.soft_targets = distillation.load(directory, examples)
    model, _, _ = load_model(last, meta, backend=machine.backend, device=machine.fabric.device)
    trainer = Trainer(model, examples, recipe.training, machine.fabric)
    tensors = files.load_tensors(last, files.TRAINING)
    try:
        trainer.load_state(meta["position"], tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise files.damaged(last, error) from None
    kept = ("model", "training", "task", "source", "target", "training_pairs")
    meta = {key: meta[key] for key in kept} | {
        "target_bound": asdict(_bound(examples)),
        START_FROM: meta.get(START_FROM),
        TEACHER: meta.get(TEACHER, []),
    }
    return _make_run(directory, trainer, meta, recipe.task, data, progress, machine)


def _make_run(
    directory: Path,
    trainer: Trainer,
    meta: dict[str, Any],
    task: Task,
    data: Data,
    progress: Progress,
    machine: Machine,
) -> Run:
    bound = LengthBound(**meta["target_bound"])
    predictor = Predictor(trainer.model, data.source, data.target, bound, task)
    judge_dev = _by_perplexity if task.by_perplexity else _by_targets

    def evaluate(should_stop: Callable[[], bool]) -> dict[str, float] | None:
        trainer.model.eval()
        return judge_dev(task, predictor, data.dev, machine.fabric, should_stop)

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


def _by_perplexity(
    task: Task,
    predictor: Predictor,
    items: Sequence[Item],
    fabric: Fabric,
    should_stop: Callable[[], bool],
) -> dict[str, float] | None:
    return None if should_stop() else {PERPLEXITY: perplexity(predictor, items)}
