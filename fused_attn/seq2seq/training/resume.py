"""Resume a run, with the same options or with those that a run may change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.checkpoints.find import checkpoints, last_checkpoint
from fused_attn.seq2seq.checkpoints.load import load_model, load_vocabularies
from fused_attn.seq2seq.checkpoints.recipe import START_FROM, TEACHER, Recipe, load_recipe
from fused_attn.seq2seq.config import TrainingConfig
from fused_attn.seq2seq.data.pair_files import PairFile, Reader
from fused_attn.seq2seq.data.pairs import Data
from fused_attn.seq2seq.errors import InputError, OptionError
from fused_attn.seq2seq.option_rules import spelled
from fused_attn.seq2seq.tasks.text import Pairs
from fused_attn.seq2seq.training import distillation
from fused_attn.seq2seq.training.prepare import (
    Machine,
    check_recipe,
    load_data,
    make_run,
    metadata,
)
from fused_attn.seq2seq.training.progress import Progress
from fused_attn.seq2seq.training.run import Run
from fused_attn.seq2seq.training.trainer import Trainer

# Fields of a recipe that may change when a run is resumed, besides those of `TrainingConfig`: they
# change neither the shape of the model nor the data.
_OF_MODEL = ("dropout", "variational")
# The seed decides the order of the pairs in an epoch that may be half done.
_OF_TRAINING = tuple(f.name for f in fields(TrainingConfig) if f.name != "seed")
# Files that may have moved. Their content must be the same, except for the test set.
_FILES = ("train", "dev", "test", "lexicon", "dialogs")


def stored_run(run: Path) -> tuple[Path, dict[str, Any], Recipe]:
    """Return the last checkpoint of a run, its metadata and its recipe; raises `InputError`."""
    last = last_checkpoint(run)
    with _damage_explained(run, last):
        meta = files.load_metadata(last)
        teachers, start_from = meta.get(TEACHER, []), meta.get(START_FROM)
        if not (isinstance(teachers, list) and all(isinstance(path, str) for path in teachers)):
            raise files.damaged(last, TypeError(f"{TEACHER} must be a list of paths"))
        if not (start_from is None or isinstance(start_from, str)):
            raise files.damaged(last, TypeError(f"{START_FROM} must be a path or null"))
        return last, meta, load_recipe(last, meta)


@contextmanager
def _damage_explained(run: Path, last: Path) -> Iterator[None]:
    """Add to the error of a damaged checkpoint from which one a run can be resumed instead."""
    try:
        yield
    except files.DamagedError as error:
        earlier = [path for path in checkpoints(run) if path != last]
        if not earlier:
            raise
        hint = f"to resume from the one before it, {earlier[-1].name}, remove it"
        raise InputError(str(error), hint) from None


def changed(run: Path, recipe: Recipe, asked: Mapping[str, Any]) -> tuple[Recipe, list[str]]:
    """Return the recipe to resume a run with, and the changes in words.

    recipe: of the last checkpoint. asked: values of fields of its configurations.

    Raises `OptionError` if a field may not change, or its value is not allowed.
    """
    own = {**asdict(recipe.model), **asdict(recipe.training), **asdict(recipe.task.config)}
    new: dict[str, Any] = {}
    for name, value in asked.items():
        if own[name] == value:
            continue
        moved = name in _FILES and (name == "test" or None not in (own[name], value))
        if not (moved or name in (*_OF_MODEL, *_OF_TRAINING)):
            raise _refused(run, name, value, own)
        new[name] = value
    try:
        found = Recipe(
            updated(recipe.model, new),
            updated(recipe.training, new),
            recipe.task.updated(
                {**recipe.task.to_json(), **{n: v for n, v in new.items() if n in _FILES}}
            ),
        )
    except ValueError as error:
        name, _, reason = str(error).partition(" ")
        raise OptionError(name, reason) from None
    return found, [f"{name} {new[name]} instead of {own[name]}" for name in new]


def _refused(run: Path, name: str, value: Any, own: Mapping[str, Any]) -> OptionError:
    """The error for a field that may not change."""
    typed, named = spelled(name, value), name
    if name in ("train", "dev"):
        named = "pairs" if name == "train" else name  # the argument of `fit`
        why = f"of the run in {run} were given in Python: give the same ones to resume it"
        if own[name] is not None:
            why = f"of the run in {run} are those of the file {own[name]}: give the same ones"
        elif own["train"] is not None:
            why = f"of the run in {run} are held out from the others: leave it out to resume"
        return OptionError(named, why, typed)
    of_start = own[name]
    shown = "" if of_start is None or isinstance(of_start, tuple) else f", {of_start}"
    why = (
        f"is not that of the run in {run}{shown}: leave it out to resume, or start another run "
        f"with --start-from {run}"
    )
    return OptionError("tokens" if name.endswith("tokens") else name, why, typed)


def updated(config: Any, values: Mapping[str, Any]) -> Any:
    """Return a configuration with the values that it has a field for."""
    return replace(config, **{f.name: values[f.name] for f in fields(config) if f.name in values})


def resume_run(
    directory: Path,
    progress: Progress,
    machine: Machine,
    given: Mapping[str, Sequence[Any]] | None = None,
    recipe: Recipe | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Run:
    """Resume the run in ``directory`` from its last checkpoint.

    given: the pairs, if the run was started with pairs given in Python; see `Pairs`.
    recipe: from `changed`; None for that of the checkpoint.
    note: called with remarks for the user.

    Raises `InputError` if there is no checkpoint, it is damaged, or the pairs are not those that
    the run was started with.
    """
    last, meta, before = stored_run(directory)
    recipe = before if recipe is None else recipe
    task = recipe.task
    check_recipe(recipe)
    if isinstance(task, Pairs):
        task.given = dict(given or {})
    _check_files(directory, recipe)

    def with_known_vocabularies(data: Data) -> Data:
        for name, key, digest in (
            ("training", "training_pairs", data.fingerprint),
            ("development", "dev_pairs", data.dev_fingerprint),
        ):
            if key in meta and meta[key] != digest:
                raise InputError(
                    f"cannot resume {directory}: the {name} pairs have changed since it was started"
                )
        return task.with_vocabularies(data, *load_vocabularies(last, meta))

    recipe, data, examples = load_data(directory, recipe, machine, with_known_vocabularies)
    if bool(recipe.training.guided) != bool(before.training.guided):  # other lines may be skipped
        for text in data.notes:
            note(text)
    if meta.get(TEACHER):
        examples.soft_targets = distillation.load(directory, examples)
    now = {**meta, **recipe.to_json()}
    with _damage_explained(directory, last):
        model, _, _ = load_model(last, now, backend=machine.backend, device=machine.fabric.device)
        trainer = Trainer(model, examples, recipe.training, machine.fabric)
        tensors = files.load_tensors(last, files.TRAINING)
        try:
            trainer.load_state(meta["position"], tensors, before.training)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise files.damaged(last, error) from None
    if trainer.position.batch < meta["position"]["batch"]:
        note(f"epoch {trainer.position.epoch + 1} begins again: its batches have changed")
    found = metadata(recipe, data, examples, meta.get(START_FROM), meta.get(TEACHER, []))
    return make_run(directory, trainer, found, recipe.task, data, progress, machine)


def _check_files(directory: Path, recipe: Recipe) -> None:
    """Raise `InputError` if a file of the data is not where it was."""
    for name in _FILES:
        value = getattr(recipe.task.config, name, None)
        given = getattr(recipe.task, "given", {})
        if value is None or name == "test" or name in given:
            continue
        paths = PairFile(value, Reader()).paths if name in ("train", "dev") else [value]
        for path in paths:
            if not Path(path).exists():
                raise InputError(
                    f"cannot resume {directory}: there is no file {path}",
                    f"--{name} FILE names the file with the same data",
                )
