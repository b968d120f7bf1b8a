"""``fused-attn train``: a new run, or one that goes on."""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.checkpoints.find import find_checkpoint, last_checkpoint
from fused_attn.seq2seq.checkpoints.recipe import START_FROM, TEACHER, Recipe, load_recipe
from fused_attn.seq2seq.commands.options import as_option, note, set_threads
from fused_attn.seq2seq.config import ModelConfig, TrainingConfig
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.tasks.base import Task
from fused_attn.seq2seq.tasks.registry import TASKS
from fused_attn.seq2seq.training.fit import carry_out, is_new
from fused_attn.seq2seq.training.processes import gathered, launch, leave
from fused_attn.seq2seq.training.progress import make_progress
from fused_attn.seq2seq.training.run import Run
from fused_attn.seq2seq.training.start import Machine, resume_run, start_run

Config = TypeVar("Config", ModelConfig, TrainingConfig)


def run(args: Namespace) -> int:
    """Return 0 at the end of the plan.

    Raises KeyboardInterrupt if a signal stopped it; a checkpoint is written then.
    """
    stopped = _train(args)
    # Not after an error: another process may be waiting for this one, and this one then for it.
    leave()
    if stopped:
        raise KeyboardInterrupt
    return 0


def _train(args: Namespace) -> bool:
    """Return whether a signal stopped it."""
    set_threads(args.threads)
    directory: Path = args.output
    outcome = carry_out(directory, lambda: _resume(args) if args.resume else _start(args))
    trainer = outcome.run.trainer
    tell = trainer.fabric.print
    if outcome.was_complete:
        tell(f"{directory} is complete: all {trainer.position.step} steps are done")
    elif outcome.stopped:
        tell(
            f"stopped at step {trainer.position.step} of {trainer.total_steps}; go on with: "
            f"fused-attn train {args.task} --output {shlex.quote(str(directory))} --resume",
            file=sys.stderr,
        )
    else:
        tell(f"best checkpoint: {find_checkpoint(directory)}")
    return outcome.stopped


def _machine(args: Namespace, recipe: Recipe) -> Machine:
    fabric = launch(args.device, recipe.training.precision)
    return Machine(fabric, args.backend, args.on_disk, args.tensorboard)


def _start(args: Namespace) -> Run:
    directory: Path = args.output
    if not is_new(directory):
        raise InputError(f"{directory} is not an empty directory; --resume goes on with a run")
    if args.teacher_weight is not None and not args.teacher:
        raise InputError("--teacher-weight needs a --teacher")
    kind = TASKS[args.task]
    model, values = kind.model, {}
    if args.start_from is not None:
        origin = find_checkpoint(args.start_from)
        before = load_recipe(origin, files.load_metadata(origin))
        if before.task.name != args.task:
            raise InputError(f"--start-from: {origin} is of the task {before.task.name}")
        model, values = before.model, asdict(before.task.config)
    recipe = Recipe(_updated(model, args), _updated(kind.training, args), _task(kind, values, args))
    machine = _machine(args, recipe)
    gathered(machine.fabric, None)  # all have looked into the directory before one writes there
    tell = note if machine.fabric.is_global_zero else lambda text: None
    return start_run(
        directory, recipe, make_progress(), machine, tell, args.start_from, args.teacher
    )


def _resume(args: Namespace) -> Run:
    last = last_checkpoint(args.output)
    meta = files.load_metadata(last)
    recipe = load_recipe(last, meta)
    if recipe.task.name != args.task:
        raise InputError(f"the run in {args.output} is of the task {recipe.task.name}")
    asked = Recipe(
        _updated(recipe.model, args),
        _updated(recipe.training, args),
        _task(type(recipe.task), asdict(recipe.task.config), args),
    )
    before = {START_FROM: meta.get(START_FROM), TEACHER: meta.get(TEACHER, [])}
    given = dict(before)
    if args.start_from is not None:
        given[START_FROM] = str(args.start_from)
    if args.teacher:
        given[TEACHER] = [str(teacher) for teacher in args.teacher]
    parts = [before, *recipe.to_json().values()]
    others = [given, *asked.to_json().values()]
    for part, other in zip(parts, others, strict=True):
        for name, value in part.items():
            if other[name] != value:
                raise InputError(
                    f"the run in {args.output} was not started with this "
                    f"--{name.replace('_', '-')}; leave it out to go on, or start another run"
                )
    return resume_run(args.output, make_progress(), _machine(args, recipe))


def _updated(config: Config, args: Namespace) -> Config:
    """Return ``config`` with the options that were given."""
    options = vars(args)
    given = {f.name: options[f.name] for f in fields(config) if options[f.name] is not None}
    if given.get("score", "concat") != "concat":  # the width of a task's own score goes with it
        given = {"attn_dim": None} | given
    try:
        return replace(config, **given)
    except ValueError as error:
        raise as_option(error) from None


def _task(kind: type[Task], values: dict[str, Any], args: Namespace) -> Task:
    """Return the task with the options that were given; those of other tasks are refused."""
    known = {field.name for task in TASKS.values() for field in fields(task.kind)} - {"test"}
    given = {n: v for n, v in vars(args).items() if n in known and v is not None}
    own = {field.name for field in fields(kind.kind)}
    if others := sorted(given.keys() - own):
        option = others[0].replace("_", "-")
        raise InputError(f"--{option} is no option of the task {kind.name}")
    if args.test is not None:
        given |= kind.test_option(args.test)
    try:
        return kind(kind.kind(**values | given))
    except ValueError as error:
        raise as_option(error) from None
