"""The ``fused-attn`` command: its options, and how it fails.

Exit codes: 0 done; 2 the input cannot be used, with one line on standard error; 130 interrupted.
Nothing heavy is imported before the options are read, so that help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import NoReturn, get_args, get_type_hints

from fused_attn import __version__
from fused_attn.seq2seq.commands.option_help import (
    MODEL_HELP,
    SEARCH_HELP,
    TASK_HELP,
    TASK_SUMMARIES,
    TRAINING_HELP,
)
from fused_attn.seq2seq.config import ModelConfig, SearchConfig, TrainingConfig
from fused_attn.seq2seq.errors import InputError, OptionError
from fused_attn.seq2seq.tasks.registry import TASKS

USAGE_ERROR = 2
INTERRUPTED = 130
# What a shell reports for a program that SIGPIPE ended.
PIPE_CLOSED = 141

_MODEL_HELP = (
    "a checkpoint, or the DIR that train wrote (then its best checkpoint, or its last), or the "
    "name of a model that comes with the package: g2p"
)


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line; the usage is a matter of --help."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message}\n")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser; a parsed namespace has the command's function in ``run``."""
    parser = _Parser(
        prog="fused-attn",
        description="Fused Luong attention: train and use the sequence models that run on it.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fused-attn {__version__}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=_Parser
    )

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> _Parser:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    command("info", _info, "Show versions, instruction set, backends and why one is missing.")
    _add_train_options(
        command(
            "train",
            _train,
            "Train a model of a task, or of your own pairs of lines. Under torchrun, several "
            "processes share the work.",
        )
    )
    _add_predict_options(
        command(
            "predict",
            _predict,
            "Print what the model makes of each source, a line each. One that cannot be read ends "
            "it, after those before.",
        )
    )
    _add_evaluate_options(
        command("evaluate", _evaluate, "Measure a model's error rates on the test.")
    )
    _add_explain_options(
        command("explain", _explain, "Write an HTML page on what a model looked at in one source.")
    )
    aer = command("aer", _aer, "Print the alignment error rate of links against those of a person.")
    for name, text in (("found", "links of a model"), ("gold", "right links; 0?1 is possible")):
        aer.add_argument(name, type=Path, metavar=name.upper(), help=f"{text}, in Pharaoh's format")
    chat = command("chat", _chat, "Answer what is typed, a line each.")
    chat.add_argument("model", type=Path, metavar="MODEL", help=_MODEL_HELP)
    _add_search_options(chat)
    _add_machine_options(chat)
    curves = command("curves", _curves, "Draw the loss and the measures of trainings.")
    curves.add_argument("runs", type=Path, nargs="+", metavar="DIR", help="what train wrote")
    curves.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="a .png or a .svg file"
    )
    _add_export_options(
        command("export", _export, "Write the model of a checkpoint without what training needs.")
    )
    return parser


def _add_explain_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help=_MODEL_HELP)
    parser.add_argument("text", metavar="TEXT", help="the source")
    parser.add_argument("--output", type=Path, required=True, metavar="PAGE.html", help="the page")
    _add_search_options(parser)
    _add_machine_options(parser)


def _add_export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help=_MODEL_HELP)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new directory")
    parser.add_argument(
        "--average", type=Path, action="append", default=[], metavar="MODEL",
        help="take the mean of the parameters of this model too; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--store",
        choices=["float32", "float16", "int8"],
        default="float32",
        help="type of the stored parameters; a model computes in float32 (default: float32)",
    )


def _add_train_options(parser: argparse.ArgumentParser) -> None:
    what = ", ".join(f"{name}: {text}" for name, text in TASK_SUMMARIES.items())
    parser.add_argument(
        "task", metavar="TASK", choices=list(TASKS),
        help=f"{what}; or a YAML file with the task and any of these options, which those of the "
        "command line override",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="where checkpoints and log go"
    )
    flag = argparse.BooleanOptionalAction
    parser.add_argument(
        "--start-from", type=Path, metavar="MODEL",
        help="begin with the parameters of MODEL; its options of model and task are the defaults, "
        "and a larger --hidden makes it wider",
    )  # fmt: skip
    parser.add_argument(
        "--teacher", type=Path, action="append", default=[], metavar="MODEL",
        help="learn what this model says of every target symbol beside the right one; given "
        "several times, what they say together",
    )  # fmt: skip
    parser.add_argument(
        "--resume", action=flag, default=False, help="go on from the last checkpoint in DIR"
    )
    parser.add_argument(
        "--tensorboard", action=flag, default=False, help="also write DIR/tensorboard"
    )
    parser.add_argument(
        "--on-disk", action=flag, default=False,
        help="keep the encoded pairs in DIR, for data larger than memory",
    )  # fmt: skip
    remark = "g2p's and pairs' defaults are shown; the other tasks have some of their own"
    model, recipe = (parser.add_argument_group(name, remark) for name in ("model", "recipe"))
    _add_fields(model, ModelConfig, MODEL_HELP)
    _add_fields(recipe, TrainingConfig, TRAINING_HELP)
    data = parser.add_argument_group("data of the task")
    for task in TASKS.values():
        _add_fields(data, task.kind, TASK_HELP[task.name])
    data.add_argument(
        "--test", type=Path, metavar="FILE",
        help="keep what this file lists for the test: g2p words, scan commands; or test pairs",
    )  # fmt: skip
    _add_machine_options(parser)


def _add_fields(group: argparse._ArgumentGroup, config: type, texts: dict[str, str]) -> None:
    """Add an option for each field of a configuration, with its help.

    Absent means None: a resumed run keeps its own value.
    """
    kinds = get_type_hints(config)
    for name, text in texts.items():
        option, default = f"--{name.replace('_', '-')}", getattr(config, name)
        kind = next(k for k in (get_args(kinds[name]) or (kinds[name],)) if k is not NoneType)
        if kind is bool:
            shown = "yes" if default else "no"
            action = argparse.BooleanOptionalAction
            group.add_argument(option, action=action, help=f"{text} (default: {shown})")
            continue
        shown = "" if default is None else f" (default: {default})"
        group.add_argument(option, type=kind, metavar=kind.__name__.upper(), help=text + shown)


def _add_predict_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help=_MODEL_HELP)
    parser.add_argument(
        "text", nargs="*", metavar="TEXT", help="sources; without any, lines of standard input"
    )
    parser.add_argument(
        "--input", type=Path, metavar="FILE",
        help="read the sources here; under torchrun, processes and machines share the lines",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="FILE",
        help="write the targets of --input here, in its order; it appears when it is whole",
    )  # fmt: skip
    parser.add_argument(
        "--alignments", type=Path, metavar="FILE",
        help="write the alignments: a picture to a .png or .svg, links to a .pharaoh, all weights "
        "to a .soft file",
    )  # fmt: skip
    parser.add_argument(
        "--replace-unknown", action="store_true",
        help="put the source's symbol in place of an unknown one, by the alignment",
    )  # fmt: skip
    parser.add_argument(
        "--scores", action="store_true", help="print the score and a tab before each target"
    )
    _add_search_options(parser)
    _add_machine_options(parser)


def _add_evaluate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help=_MODEL_HELP)
    parser.add_argument(
        "--test", type=Path, metavar="FILE",
        help="judge on this file (default: the test that the model was not to see)",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=int, metavar="N", help="judge only N sources, always the same"
    )
    parser.add_argument(
        "--samples", type=int, default=0, metavar="N",
        help="also print N sources with the model's target and the references",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    _add_search_options(parser)
    _add_machine_options(parser)


def _add_search_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ensemble", type=Path, action="append", default=[], metavar="MODEL",
        help="let this model decide too; may be given several times",
    )  # fmt: skip
    _add_fields(parser.add_argument_group("search"), SearchConfig, SEARCH_HELP)


def _add_machine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--backend", default="auto", help="attention backend, see info (default: auto)"
    )
    group.add_argument(
        "--device", default="auto", metavar="NAME",
        help="cpu, cuda, cuda:N, or auto: a GPU if there is one (default: auto)",
    )  # fmt: skip
    group.add_argument(
        "--threads", type=int, metavar="N", help="threads of torch (default: one for each core)"
    )


def _info(_: argparse.Namespace) -> int:
    from fused_attn import info

    return info.main()


def _train(args: argparse.Namespace) -> int:
    from fused_attn.seq2seq.commands import train

    return train.run(args)


def _predict(args: argparse.Namespace) -> int:
    from fused_attn.seq2seq.commands import predict

    return predict.run(args)


def _evaluate(args: argparse.Namespace) -> int:
    from fused_attn.seq2seq.commands import evaluate

    return evaluate.run(args)


def _explain(args: argparse.Namespace) -> int:
    from fused_attn.seq2seq.commands import explain

    return explain.run(args)


def _aer(args: argparse.Namespace) -> int:
    from fused_attn.seq2seq.commands import align

    return align.run(args)


def _chat(args: argparse.Namespace) -> int:
    from fused_attn.seq2seq.commands import chat

    return chat.run(args)


def _curves(args: argparse.Namespace) -> int:
    from fused_attn.seq2seq.commands import curves

    return curves.run(args)


def _export(args: argparse.Namespace) -> int:
    from fused_attn.seq2seq.commands import export

    return export.run(args)


def with_config(argv: Sequence[str]) -> list[str]:
    """Put the options of a YAML file in the place where ``train`` names it; raises `InputError`.

    Sections of the file are for its readers: what stands in them counts as if it stood outside.
    """
    found = list(argv)
    files = [i for i, text in enumerate(found) if text.endswith((".yaml", ".yml"))]
    if found[:1] != ["train"] or not files or (files[0] > 1 and found[files[0] - 1][:2] == "--"):
        return found
    import yaml

    path = found[files[0]]
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise InputError(f"cannot read {path}: {reason}") from None
    if not isinstance(values, dict) or not isinstance(values.get("task"), str):
        raise InputError(f"{path}: expected a line 'task: NAME' and options, a line each")
    options: list[str] = []
    for name, value in _flat(values):
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            options.append(option if value else f"--no-{option[2:]}")
        elif isinstance(value, (str, int, float)):
            options += [f"{option}={value}"]
        elif value is not None:
            raise InputError(f"{path}: {name} must be one value, got {value!r}")
    rest = found[1 : files[0]] + found[files[0] + 1 :]
    return ["train", values["task"], *options, *rest]


def _flat(values: dict[str, object]) -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value)
        elif name != "task":
            yield str(name), value


def _discard_output() -> None:
    """Drop what standard output cannot take: the interpreter would try once more when it exits."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``argv`` (the process's arguments if None); return its exit code."""
    parser = make_parser()
    try:
        args = parser.parse_args(with_config(sys.argv[1:] if argv is None else argv))
        code: int = args.run(args)
        sys.stdout.flush()  # here, where a closed pipe can still be handled
    except InputError as error:
        text = error.on_the_command_line if isinstance(error, OptionError) else str(error)
        print(f"fused-attn: error: {text}", file=sys.stderr)
        return USAGE_ERROR
    except ModuleNotFoundError as error:
        package = (error.name or "fused_attn").partition(".")[0]
        if package == "fused_attn":
            raise
        install = "pip install 'fused-attn[seq2seq]'"
        print(f"fused-attn: error: {package} is not installed: {install}", file=sys.stderr)
        return USAGE_ERROR
    except BrokenPipeError:  # nobody reads on
        _discard_output()
        return PIPE_CLOSED
    except OSError as error:
        _discard_output()
        place = f"{error.filename}: " if error.filename else ""
        print(f"fused-attn: error: {place}{error.strerror}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    return code
