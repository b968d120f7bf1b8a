"""The arguments and options of ``fused-attn train``, and its help for a task.

This module does not import torch.
"""

from __future__ import annotations

from argparse import SUPPRESS
from pathlib import Path
from typing import Any

from fused_attn.seq2seq.commands import option_help as texts
from fused_attn.seq2seq.commands.config_file import is_config_file, read_config
from fused_attn.seq2seq.commands.parser import (
    Command,
    CommandParser,
    Options,
    add_machine,
    given_options,
    shown_default,
)
from fused_attn.seq2seq.config import ModelConfig, TrainingConfig
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.option_rules import merged
from fused_attn.seq2seq.tasks.defaults import FOLLOWING, WIDE_EMBEDDING
from fused_attn.seq2seq.tasks.registry import TASKS
from fused_attn.seq2seq.tasks.text import Pairs


def _add_train(options: Options) -> None:
    task, parser = options.task, options.parser
    if task is None:
        # TASK may be missing when help is requested, and it may be a configuration file.
        options.argument("task", nargs="?", help=SUPPRESS)
        parser.description = _about_tasks(parser)
    else:
        parser.usage = f"{parser.prog} {task} --output DIR [OPTION ...]"
        parser.description = f"Train a model of the task {task}:\n{texts.TASK_SUMMARIES[task]}."
    options.section("run")
    options.option("output", type=Path, metavar="DIR", help="directory for checkpoints and logs")
    options.flag("resume", help="continue from the last checkpoint in DIR")
    options.option(
        "start-from",
        type=Path,
        metavar="MODEL",
        help="start with the parameters and options of this model; a larger --hidden widens it",
    )
    options.option(
        "teacher",
        type=Path,
        action="append",
        default=[],
        metavar="MODEL",
        help="also learn the probabilities that this model gives to every target symbol; can be "
        "repeated, to learn the mean of several models",
    )
    options.flag("tensorboard", help="also write TensorBoard events to DIR/tensorboard")
    options.flag("on-disk", help="store the encoded pairs in DIR, for data larger than memory")
    _add_task(options, list(TASKS) if task is None else [task])
    for title, attribute, kind, help_texts in (
        ("model", "model", ModelConfig, texts.MODEL_HELP),
        ("training", "training", TrainingConfig, texts.TRAINING_HELP),
    ):
        options.section(title)
        configs = [getattr(TASKS[name], attribute) for name in ([task] if task else TASKS)]
        for name, text in help_texts.items():
            values = {getattr(config, name) for config in configs}
            if name == "batch_size" and task and configs[0].batch_tokens is not None:
                values = {"--batch-tokens"}  # the recipe of this task sets it instead
            elif (
                task
                and name in FOLLOWING
                and values != {WIDE_EMBEDDING}
                and issubclass(TASKS[task], Pairs)
            ):
                values = {f"{values.pop()} or {FOLLOWING[name]}"}
            options.field(kind, name, text, shown_default(values))
    add_machine(options)
    options.section("help")
    options.help("store_const", has_more=True)


def _add_task(options: Options, names: list[str]) -> None:
    """Add the options of the tasks, each once; with several, the help names those that have it."""
    options.section("data")
    found: dict[str, list[str]] = {}
    for name in names:
        for field in texts.TASK_HELP[name]:
            found.setdefault(field, []).append(name)
    for field, owners in found.items():
        kinds = [TASKS[name].kind for name in owners]
        shown = shown_default({getattr(kind, field) for kind in kinds})
        text = texts.TASK_HELP[owners[0]][field]
        options.field(kinds[0], field, _of(owners, names) + text, shown)
    owners = [name for name in names if name in texts.TEST_HELP]
    if owners:
        text = texts.TEST_HELP[owners[0]] if len(names) == 1 else "the test set"
        options.option("test", type=Path, metavar="FILE", help=_of(owners, names) + text)


def _of(owners: list[str], names: list[str]) -> str:
    return "" if len(names) == 1 else f"{', '.join(owners)}: "


def _about_tasks(parser: CommandParser) -> str:
    file = {"FILE.yaml": "a file with 'task: NAME' and options; the command line overrides it"}
    rows = [f"  {name:<11}{text}" for name, text in {**texts.TASK_SUMMARIES, **file}.items()]
    shows = f"'{parser.prog} TASK --help' shows the options of a task and their defaults."
    return "\n".join((str(parser.description), "", "tasks:", *rows, "", shows))


def _finish_train(parser: CommandParser, given: dict[str, Any]) -> dict[str, Any]:
    """Read the configuration file if TASK is one, and print the help if it is requested.

    ``line`` and ``file`` are the options given on the command line and in the file.
    """
    line: dict[str, Any] = dict(given)
    file: dict[str, Any] = {}
    task = line.pop("task", None)
    if task is not None and is_config_file(task):
        task, file = _from_file(parser, task)
    if task is not None and task not in TASKS:
        raise InputError(f"TASK must be one of {', '.join(TASKS)} or a YAML file, got {task!r}")
    if "all" in line:
        print(TRAIN.help_text(parser.prog, everything=line["all"], task=task), end="")
        parser.exit()
    options = merged(file, line)
    missing = ["TASK"] * (task is None) + ["--output"] * ("output" not in options)
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    return {**options, "task": task, "line": line, "file": file}


def _from_file(parser: CommandParser, path: str) -> tuple[str | None, dict[str, Any]]:
    """Return the task and the options in a configuration file."""
    parser.place = path
    found, unknown = parser.parse_known_args(read_config(path))
    parser.place = None
    unknown += ["--help"] if "all" in found else []
    if unknown:
        raise InputError(f"{path}: there is no option {unknown[0].partition('=')[0]}")
    file = given_options(found)
    return file.pop("task", None), file


TRAIN = Command(
    "train",
    "Train a model. Under torchrun, several processes share the work.",
    "TASK --output DIR [OPTION ...]",
    _add_train,
    _finish_train,
    texts.SELDOM_IN_TRAINING,
    of_every_task=texts.EVERY_TASK,
)
