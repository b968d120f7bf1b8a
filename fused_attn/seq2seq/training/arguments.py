"""The arguments of `fit`: checked, then turned into a recipe or compared with a run's recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.checkpoints.find import checkpoints, find_checkpoint
from fused_attn.seq2seq.checkpoints.recipe import START_FROM, TEACHER, Recipe, load_recipe
from fused_attn.seq2seq.checkpoints.values import check_types, check_value
from fused_attn.seq2seq.config import ModelConfig, TrainingConfig
from fused_attn.seq2seq.data.tokenizers import TOKENS
from fused_attn.seq2seq.errors import InputError, OptionError
from fused_attn.seq2seq.option_rules import TRAINING_NEEDS, settle
from fused_attn.seq2seq.tasks.defaults import FOLLOWING
from fused_attn.seq2seq.tasks.registry import TASKS
from fused_attn.seq2seq.tasks.text import Pairs, TextConfig
from fused_attn.seq2seq.training.resume import changed, stored_run, updated

# Options of `fit` that go to the configuration of the task.
DATA_OPTIONS = ("min_count", "max_length", "skip_bad", "vocabulary")


def is_path(pairs: Any) -> bool:
    """Whether pairs are in a file."""
    return isinstance(pairs, (str, Path))


def directory(output: Any) -> Path:
    """Return the directory of a run; raises `OptionError` if it is not a path."""
    if not is_path(output) or not str(output):
        raise OptionError("output", f"must be the path of a directory, got {output!r}")
    return Path(output)


def given_fields(name: str, value: Any, kind: type) -> tuple[Any, dict[str, Any]]:
    """Return a configuration that was given, or None, and the fields that a mapping gives.

    name: of the argument. kind: `ModelConfig` or `TrainingConfig`.

    Raises `OptionError` unless ``value`` is one of these, a mapping of its fields, or None. Fields
    must have their declared types: the checkpoints of the run store them.
    """
    if isinstance(value, Mapping):
        hints = get_type_hints(kind)
        with _as_option_error():
            for field, each in value.items():
                if field not in hints:
                    known = ", ".join(f.name for f in fields(kind))
                    raise OptionError(name, f"has no field {field!r}; there are {known}")
                check_value(field, each, hints[field])
        return None, dict(value)
    if value is None:
        return None, {}
    if not isinstance(value, kind):
        what = f"must be a {kind.__name__} or a mapping of its fields, got {type(value).__name__}"
        raise OptionError(name, what)
    with _as_option_error():
        check_types(value)
    return value, {}


@contextmanager
def _as_option_error() -> Iterator[None]:
    """Turn an error whose text starts with the name of an option into an `OptionError`."""
    try:
        yield
    except (TypeError, ValueError) as error:
        name, _, reason = str(error).partition(" ")
        raise OptionError(name, reason) from None


def kind_of_task(name: str | None) -> type[Pairs]:
    """Return the task on pairs of this name; raises `OptionError` if there is none."""
    known = {name: kind for name, kind in TASKS.items() if issubclass(kind, Pairs)}
    name = "pairs" if name is None else name
    if name not in known:
        raise OptionError("task", f"must be {' or '.join(known)}, got {name!r}")
    return known[name]


def listed(name: str, pairs: Any) -> list[Any]:
    """Return pairs that were given in Python; raises `OptionError` if they are not iterable."""
    try:
        if hasattr(pairs, "__len__") and hasattr(pairs, "__getitem__"):
            if not hasattr(pairs, "__iter__"):  # a map-style data set
                return [pairs[index] for index in range(len(pairs))]
        return list(pairs)
    except TypeError:
        what = f"must be an iterable of pairs or the path of a file, got {type(pairs).__name__}"
        raise OptionError("pairs" if name == "train" else name, what) from None


def tokens(given: Any) -> dict[str, str | None]:
    """Return the fields of the task's configuration that ``tokens`` sets."""
    if given is None:
        return {}
    if isinstance(given, str):
        return {"tokens": given, "source_tokens": None, "target_tokens": None}
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        what = f"must be one of {', '.join(TOKENS)}, or two for sources and targets, got {given!r}"
        raise OptionError("tokens", what)
    source, target = given
    return {"source_tokens": source, "target_tokens": target}


def data_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the data; raises TypeError for one that is not an option.

    Raises `OptionError` if one has another type than its field of `TextConfig`.
    """
    elsewhere = {
        field.name: f"{argument}={kind.__name__}({field.name}=...)"
        for argument, kind in (("model", ModelConfig), ("training", TrainingConfig))
        for field in fields(kind)
    }
    for name in options:
        if name in elsewhere:
            raise TypeError(f"unknown option {name!r}: it belongs in {elsewhere[name]}")
        if name not in DATA_OPTIONS:
            raise TypeError(f"unknown option {name!r}: those of data are {', '.join(DATA_OPTIONS)}")
    hints = get_type_hints(TextConfig)
    with _as_option_error():
        for name, value in options.items():
            check_value(name, value, hints[name])
    return dict(options)


def recipe(
    kind: type[Pairs],
    model: Any,
    training: Any,
    start_from: str | Path | None,
    teachers: Sequence[str | Path],
    chosen: Mapping[str, Any],
    in_python: Mapping[str, list[Any]],
) -> tuple[Recipe, set[str]]:
    """Return the recipe of a new run, and the names of the fields that may follow the data.

    model, training, teachers: as given to `fit`. chosen: fields of the task's configuration that
    are given. in_python: pairs by "train" and "dev" that are not in files.

    Raises `OptionError` if a value is not allowed, or an option has no effect.
    """
    model, of_model = given_fields("model", model, ModelConfig)
    training, of_training = given_fields("training", training, TrainingConfig)
    shape, values = kind.model, {}
    if start_from is not None:
        origin = find_checkpoint(start_from)
        before = load_recipe(origin, files.load_metadata(origin))
        if before.task.name != kind.name:
            what = f": {origin} has the task {before.task.name}, expected {kind.name}"
            raise OptionError("start_from", what)
        shape = before.model
        values = asdict(before.task.config) | dict.fromkeys(("train", "dev", "test"))
        del values["least_dev"]  # about its data, not about this run's
    shape, steps = model or shape, training or kind.training
    defaults = {f.name: getattr(kind.kind, f.name) for f in fields(kind.kind)} | values
    rest = {**asdict(shape), **asdict(steps), **defaults}
    rest |= {"start_from": start_from, "teacher": teachers, "backend": "auto"}
    found = settle(TRAINING_NEEDS, rest, {**of_model, **of_training, **chosen})
    with _as_option_error():
        config = kind.kind(**{**values, **chosen})
        shape, steps = updated(shape, found), updated(steps, found)
    fixed = set(of_model) | set(of_training)
    fixed |= {"embedding"} if model is not None or start_from is not None else set()
    fixed |= {"epochs", "batch_size"} if training is not None else set()
    return Recipe(shape, steps, kind(config, in_python)), FOLLOWING.keys() - fixed


def recipe_to_resume(
    run: Path,
    asked: Mapping[str, Any],
    chosen: Mapping[str, Any],
    in_python: Mapping[str, list[Any]],
) -> tuple[Recipe, list[str]]:
    """Return the recipe to resume a run with, and what has changed, in words.

    asked: task, model, training, start_from and teachers, None where they are not given.

    Raises `InputError` if there is no run of pairs, or if something is asked for that it was not
    started with and that may not change.
    """
    _, meta, found = stored_run(run)
    if not isinstance(found.task, Pairs):
        raise InputError(
            f"the run in {run} has the task {found.task.name}; resume it with "
            f"fused-attn train {found.task.name} --output {run} --resume"
        )
    own = {"task": found.task.name, "start_from": meta.get(START_FROM)}
    own["teachers"] = meta.get(TEACHER) or None
    given = {name: asked[name] for name in own}
    if given["start_from"] is not None:
        given["start_from"] = str(given["start_from"])
    if given["teachers"] is not None:
        given["teachers"] = [str(teacher) for teacher in given["teachers"]]
    for name, value in given.items():
        if value is not None and value != own[name]:
            raise OptionError(name, f"is not that of the run in {run}: leave it out to resume")
    model, of_model = given_fields("model", asked["model"], ModelConfig)
    training, of_training = given_fields("training", asked["training"], TrainingConfig)
    before = {**asdict(found.model), **asdict(found.training), **asdict(found.task.config)}
    rest = before | {"start_from": own["start_from"], "teacher": own["teachers"] or []}
    rest |= {"backend": "auto"}
    values = settle(TRAINING_NEEDS, rest, {**of_model, **of_training, **chosen})
    for config in (model, training):
        values |= {} if config is None else asdict(config)
    return changed(run, found, values | dict.fromkeys(in_python))  # those have no file


def why_not_new(run: Path) -> str:
    """Return why a run cannot start in a directory, or a file, that exists."""
    if not run.is_dir():
        return f"output must be a directory, and {run} is a file"
    resume = "; to resume the run in it, pass resume=True" if checkpoints(run) else ""
    return f"{run} is not an empty directory{resume}"
