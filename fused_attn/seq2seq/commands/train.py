"""``fused-attn train``: start a run, or resume one."""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.checkpoints.find import find_checkpoint
from fused_attn.seq2seq.checkpoints.recipe import START_FROM, TEACHER, Recipe, load_recipe
from fused_attn.seq2seq.commands.options import as_option, note, set_threads
from fused_attn.seq2seq.config import ModelConfig, TrainingConfig
from fused_attn.seq2seq.errors import InputError, OptionError
from fused_attn.seq2seq.option_rules import TRAINING_NEEDS, merged, settle, spelled
from fused_attn.seq2seq.tasks.base import Task
from fused_attn.seq2seq.tasks.defaults import FOLLOWING
from fused_attn.seq2seq.tasks.registry import TASKS
from fused_attn.seq2seq.tasks.text import Pairs
from fused_attn.seq2seq.training.directory import is_new
from fused_attn.seq2seq.training.prepare import Machine
from fused_attn.seq2seq.training.processes import gathered, launch, leave
from fused_attn.seq2seq.training.progress import make_progress
from fused_attn.seq2seq.training.resume import changed, resume_run, stored_run
from fused_attn.seq2seq.training.run import Run, carry_out
from fused_attn.seq2seq.training.start import start_run

Config = TypeVar("Config", ModelConfig, TrainingConfig)


def run(args: Namespace) -> int:
    """Start or resume a run; return 0 when training is complete.

    Raises KeyboardInterrupt if a signal stopped it; a checkpoint is written then.
    """
    stopped = _train(args)
    # Not after an error: another process may still wait for this one, and both would hang.
    leave()
    if stopped:
        raise KeyboardInterrupt
    return 0


def _train(args: Namespace) -> bool:
    """Start or resume a run; return whether a signal stopped it."""
    set_threads(args.threads)
    directory: Path = args.output
    act = _resume if args.resume else _start
    outcome = carry_out(directory, lambda: act(args), resume=args.resume)
    trainer = outcome.run.trainer
    tell = trainer.fabric.print
    if outcome.was_complete:
        steps = f"all {trainer.position.step} steps are done"
        if trainer.stopped_early:
            steps = f"no improvement for {trainer.position.waited} epochs"
        options = " and ".join(spelled(name, None) for name in trainer.ended_by)
        tell(f"{directory} is complete: {steps}; --resume with a larger {options} continues it")
    elif outcome.stopped:
        tell(
            f"stopped at step {trainer.position.step} of {trainer.total_steps}; resume with: "
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
        raise InputError(f"{directory} is not an empty directory; --resume continues a run")
    kind = TASKS[args.task]
    _refuse_options_of_other_tasks(kind, {**args.file, **args.line})
    model, values = kind.model, {f.name: getattr(kind.kind, f.name) for f in fields(kind.kind)}
    if args.start_from is not None:
        origin = find_checkpoint(args.start_from)
        before = load_recipe(origin, files.load_metadata(origin))
        if before.task.name != args.task:
            raise InputError(f"--start-from: the task of {origin} is {before.task.name}")
        model, values = before.model, asdict(before.task.config)
        values.pop("least_dev", None)  # about its data, not about this run's
    defaults = {**asdict(model), **asdict(kind.training), **values}
    defaults |= {"teacher": args.teacher, "start_from": args.start_from, "backend": args.backend}
    given = settle(TRAINING_NEEDS, defaults, args.line, args.file)
    recipe = Recipe(
        _updated(model, given), _updated(kind.training, given), _task(kind, values, given)
    )
    machine = _machine(args, recipe)
    gathered(machine.fabric, None)  # all have looked into the directory before one writes there
    tell = note if machine.fabric.is_global_zero else lambda text: None
    free = FOLLOWING.keys() - given.keys() if issubclass(kind, Pairs) else set()
    if args.start_from is not None:
        free -= {"embedding"}  # part of the model
    return start_run(
        directory, recipe, make_progress(), machine, tell, args.start_from, args.teacher, free
    )


def _resume(args: Namespace) -> Run:
    _, meta, recipe = stored_run(args.output)
    if recipe.task.name != args.task:
        raise InputError(f"the task of the run in {args.output} is {recipe.task.name}")
    kind = type(recipe.task)
    options = merged(args.file, args.line)
    _refuse_options_of_other_tasks(kind, options)
    before = {START_FROM: meta.get(START_FROM), TEACHER: meta.get(TEACHER, [])}
    started = {START_FROM: args.start_from and str(args.start_from)}
    started[TEACHER] = [str(teacher) for teacher in args.teacher]
    for name, value in started.items():
        if value and value != before[name]:
            raise OptionError(
                name, f"is not that of the run in {args.output}: leave it out to resume"
            )
    own = {**asdict(recipe.model), **asdict(recipe.training), **asdict(recipe.task.config)}
    values = own | before | {"backend": args.backend}
    given = settle(TRAINING_NEEDS, values, args.line, args.file)
    given = {n: v for n, v in {**given, **_of_task(kind, given)}.items() if n in own}
    recipe, changes = changed(args.output, recipe, given)
    machine = _machine(args, recipe)
    tell = note if machine.fabric.is_global_zero else lambda text: None
    if changes:
        tell(f"resuming with {', '.join(changes)}")
    return resume_run(args.output, make_progress(), machine, recipe=recipe, note=tell)


def _updated(config: Config, options: Mapping[str, Any]) -> Config:
    """Return ``config`` with the options that it has a field for."""
    given = {f.name: options[f.name] for f in fields(config) if f.name in options}
    try:
        return replace(config, **given)
    except ValueError as error:
        raise as_option(error) from None


def _refuse_options_of_other_tasks(kind: type[Task], options: Mapping[str, Any]) -> None:
    names = {field.name for task in TASKS.values() for field in fields(task.kind)} - {"test"}
    own = {field.name for field in fields(kind.kind)}
    for name in sorted(options.keys() & names - own):
        option = spelled(name, options[name])
        raise InputError(f"{option} is not an option of the task {kind.name}")


def _of_task(kind: type[Task], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the task's configuration that the options set."""
    names = {field.name for field in fields(kind.kind)} - {"test"}
    given = {name: value for name, value in options.items() if name in names}
    return given | (kind.test_option(options["test"]) if "test" in options else {})


def _task(kind: type[Task], values: Mapping[str, Any], options: Mapping[str, Any]) -> Task:
    """Return the task with the options that it has a field for."""
    try:
        return kind(kind.kind(**{**values, **_of_task(kind, options)}))
    except ValueError as error:
        raise as_option(error) from None
