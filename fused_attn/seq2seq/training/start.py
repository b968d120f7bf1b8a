"""Start a run: load the data, build the model and the trainer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from lightning_fabric import Fabric

from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.checkpoints.find import find_checkpoint
from fused_attn.seq2seq.checkpoints.load import load_vocabularies, require_backend
from fused_attn.seq2seq.checkpoints.recipe import Recipe, load_recipe
from fused_attn.seq2seq.config import ModelConfig
from fused_attn.seq2seq.data.examples import Examples
from fused_attn.seq2seq.data.pairs import Data
from fused_attn.seq2seq.errors import OptionError
from fused_attn.seq2seq.inference.predictor import Predictor
from fused_attn.seq2seq.model.extend import extended
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.model.widen import can_grow, grown
from fused_attn.seq2seq.tasks.base import Task
from fused_attn.seq2seq.tasks.defaults import FOLLOWING, defaults
from fused_attn.seq2seq.tasks.text import TextTask
from fused_attn.seq2seq.training import distillation
from fused_attn.seq2seq.training.directory import clear, is_new
from fused_attn.seq2seq.training.prepare import (
    Machine,
    check_recipe,
    load_data,
    make_run,
    metadata,
)
from fused_attn.seq2seq.training.processes import gathered
from fused_attn.seq2seq.training.progress import Progress
from fused_attn.seq2seq.training.run import Run
from fused_attn.seq2seq.training.trainer import Trainer
from fused_attn.seq2seq.vocabulary import UNKNOWN, Vocabulary

_SHOWN_SYMBOLS = 8  # of those that are new to a vocabulary


def start_run(
    directory: Path,
    recipe: Recipe,
    progress: Progress,
    machine: Machine,
    note: Callable[[str], None] = lambda text: None,
    start_from: str | Path | None = None,
    teachers: Sequence[str | Path] = (),
    free: Collection[str] = (),
) -> Run:
    """Start a run: write its first checkpoint and return it.

    note: called with remarks for the user, such as how many lines of the data were skipped.
    start_from: a model whose parameters and vocabularies the run starts with. Symbols of the data
        that are new to a vocabulary are added to it, unless it has subwords.
    teachers: models whose probabilities the run learns besides the data.
    free: fields of the recipe that follow the data, see `defaults`: those nobody has set.

    Raises `InputError` if the data cannot be read, the backend cannot run the model, or
    ``start_from`` or a teacher does not match them; OSError if the directory cannot be written.
    """
    with _nothing_left(directory, machine.fabric):
        return _start(directory, recipe, progress, machine, note, start_from, teachers, free)


@contextmanager
def _nothing_left(directory: Path, fabric: Fabric) -> Iterator[None]:
    """Remove what a failed start writes into the directory of a new run.

    First remove what a start has left that was killed.
    """
    existed = directory.exists()
    cleans = fabric.is_global_zero and is_new(directory)
    if cleans and existed:
        clear(directory)
    try:
        yield
    except BaseException:
        if cleans and directory.is_dir():
            clear(directory)
            if not existed:
                directory.rmdir()
        raise


def _start(
    directory: Path,
    recipe: Recipe,
    progress: Progress,
    machine: Machine,
    note: Callable[[str], None],
    start_from: str | Path | None,
    teachers: Sequence[str | Path],
    free: Collection[str],
) -> Run:
    require_backend(machine.backend, recipe.model.score, machine.fabric.device)
    check_recipe(recipe)
    origin = None if start_from is None else find_checkpoint(start_from)
    if isinstance(recipe.task, TextTask) and origin is not None:
        if "subwords" in recipe.task.tokens and recipe.task.config.subwords is None:
            raise OptionError("tokens", f"subwords are those of the model, and {origin} has none")

    def with_known_vocabularies(data: Data) -> Data:
        if origin is None:
            return data
        known = load_vocabularies(origin, files.load_metadata(origin))
        wider = _with_new_symbols(recipe.task, recipe.model, data, known)
        return recipe.task.with_vocabularies(data, *wider)

    recipe, data, examples = load_data(directory, recipe, machine, with_known_vocabularies)
    notes = list(data.notes)
    recipe = _following(recipe, data, len(examples), free, notes)
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
        _initialise_from(model, origin, data, notes)
    for text in notes:
        note(text)
    if teachers:
        _run_teachers(teachers, data, examples, directory, machine, note)
    trainer = Trainer(model, examples, recipe.training, machine.fabric)
    if rank := machine.fabric.global_rank:  # dropout differs between processes
        torch.manual_seed(recipe.training.seed + rank)
    began = None if start_from is None else str(start_from)
    meta = metadata(recipe, data, examples, began, [str(teacher) for teacher in teachers])
    run = make_run(directory, trainer, meta, recipe.task, data, progress, machine)
    run.start()
    return run


def _following(
    recipe: Recipe, data: Data, pairs: int, free: Collection[str], notes: list[str]
) -> Recipe:
    """The recipe with defaults that suit the data; ``notes`` gets what was chosen."""
    sizes = len(data.source.symbols), len(data.target.symbols)
    given = [name for name in FOLLOWING if name not in free]
    model, training, chosen = defaults(recipe.model, recipe.training, given, pairs, *sizes)
    notes += (f"chosen for this data: {text}" for text in chosen)
    return replace(recipe, model=model, training=training)


def _with_new_symbols(
    task: Task, model: ModelConfig, data: Data, known: tuple[Vocabulary, Vocabulary]
) -> tuple[Vocabulary, Vocabulary]:
    """The vocabularies of a model, with the symbols of the data that are new at their ends."""
    if not isinstance(task, TextTask):
        return known
    new: list[list[str]] = []
    for vocabulary, own, tokens in zip(known, (data.source, data.target), task.tokens, strict=True):
        present = set(vocabulary.symbols)
        found = () if tokens == "subwords" else own.symbols
        more = [symbol for symbol in found if symbol not in present]
        new.append([] if more == [UNKNOWN] else more)
    if model.tie == "all":  # one vocabulary for both
        new = [list(dict.fromkeys(new[0] + new[1]))] * 2
    source, target = (
        Vocabulary([*vocabulary.symbols, *symbols])
        for vocabulary, symbols in zip(known, new, strict=True)
    )
    return source, target


def _initialise_from(model: Seq2Seq, origin: Path, data: Data, notes: list[str]) -> None:
    """Load the parameters of a checkpoint, whose model may be narrower and have fewer symbols; see
    `widen` and `extend`. ``notes`` gets the symbols that are new.
    """
    parameters = files.load_tensors(origin, files.MODEL)
    meta = files.load_metadata(origin)
    before = load_recipe(origin, meta).model
    known = load_vocabularies(origin, meta)
    try:
        parameters = extended(parameters, model.state_dict(), before.tie is not None)
        if can_grow(before, model.config):
            parameters = grown(before, parameters, model.config, model.state_dict())
        model.load_state_dict(parameters)
    except (KeyError, ValueError) as error:
        raise files.damaged(origin, error) from None
    except RuntimeError as error:  # names or shapes of parameters do not match
        raise _other_shape(origin, before, model.config) or files.damaged(origin, error) from None
    for name, old, now in zip(("source", "target"), known, (data.source, data.target), strict=True):
        if new := now.symbols[len(old.symbols) :]:
            shown = " ".join(new[:_SHOWN_SYMBOLS]) + (" ..." if len(new) > _SHOWN_SYMBOLS else "")
            plural = "" if len(new) == 1 else "s"
            notes.append(f"{len(new):,} new {name} symbol{plural} added to the vocabulary: {shown}")


def _other_shape(origin: Path, before: ModelConfig, config: ModelConfig) -> OptionError | None:
    """The error that names the options in which a model differs from the one to start from."""
    old, new = asdict(before), asdict(config)
    names = sorted(old.keys() - {"dropout", "variational"})  # these two have no parameters
    changed = [f"{name} {old[name]}, not {new[name]}" for name in names if old[name] != new[name]]
    if not changed:
        return None
    return OptionError("start_from", f": {origin} has another shape: {', '.join(changed)}")


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
