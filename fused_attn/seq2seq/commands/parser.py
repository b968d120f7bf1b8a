"""How the options of a command are read and shown.

The parsed namespace lacks the options that are not given, so that a given value can be told from a
default. `Options.defaults` has the values to fill in afterwards.
"""

from __future__ import annotations

import argparse
import sys
from argparse import SUPPRESS, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, get_args, get_type_hints

from fused_attn.seq2seq.commands.option_help import FILES
from fused_attn.seq2seq.commands.streams import argument_bytes

# Exit codes of commands. INCOMPLETE: done, but some sources could not be read.
INCOMPLETE, USAGE_ERROR = 1, 2


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line; the usage is left to --help.

    place: where the options come from, if that is not the command line.
    """

    place: str | None = None

    def error(self, message: str) -> NoReturn:
        where = "" if self.place is None else f"{self.place}: "
        self.exit(USAGE_ERROR, f"{self.prog}: error: {where}{message}\n")


class CommandParser(Parser):
    """The parser of one command. It takes options and arguments in any order."""

    def __init__(self, **details: Any) -> None:
        super().__init__(
            add_help=False,
            allow_abbrev=False,
            argument_default=SUPPRESS,
            formatter_class=_Formatter,
            **details,
        )
        self._is_intermixing = False

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Namespace | None = None
    ) -> tuple[Namespace, list[str]]:
        # argparse itself calls this method again: for the options, then for the arguments.
        if self._is_intermixing:
            return super().parse_known_args(args, namespace)
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        arguments = words[end + 1 :]
        # The second of these passes would read what follows "--" as options.
        marked = [f"{_MARK}{number}" for number in range(len(arguments))]
        self._is_intermixing = True
        try:
            found, rest = self.parse_known_intermixed_args([*words[:end], *marked], namespace)
        finally:
            self._is_intermixing = False
        originals = dict(zip(marked, arguments, strict=True))
        for name, value in vars(found).items():
            setattr(found, name, _unmarked(value, originals))
        return found, [originals.get(word, word) for word in rest]


_MARK = "\0"  # cannot occur in an argument of a process


def _unmarked(value: Any, originals: dict[str, str]) -> Any:
    if isinstance(value, list):
        return [_unmarked(each, originals) for each in value]
    if isinstance(value, str):
        return originals.get(value, value)
    if isinstance(value, Path) and str(value) in originals:
        return Path(originals[str(value)])
    return value


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Shows a flag and its opposite as one: --[no-]bucket."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return f"--[no-]{action.option_strings[0][2:]}"
        return super()._format_action_invocation(action)


class Options:
    """Adds arguments and options to the parser of a command.

    Args:
        parser: the parser.
        is_shown: whether the help shows the option of a dest.
        hidden: dests that no help shows.
        task: for ``train``, the task whose options and defaults the help shows; None for all.

    Attributes:
        defaults: the values of options that are not given, by dest.
        left_out: number of options that the help leaves out.
    """

    def __init__(
        self,
        parser: CommandParser,
        is_shown: Callable[[str], bool] = lambda dest: True,
        hidden: frozenset[str] = frozenset(),
        task: str | None = None,
    ) -> None:
        self.parser = parser
        self.is_shown = is_shown
        self.hidden = hidden
        self.task = task
        self.defaults: dict[str, Any] = {}
        self.left_out = 0
        self._arguments = parser.add_argument_group("arguments")
        self._group = parser.add_argument_group("options")

    def section(self, title: str) -> None:
        """Put the options that follow under a title."""
        self._group = self.parser.add_argument_group(title)

    def argument(self, name: str, *, default: Any = None, **details: Any) -> None:
        """Add a positional argument; ``default`` is for one that may be missing."""
        self.defaults[name] = default
        self._arguments.add_argument(name, **details)

    def option(self, name: str, *, help: str, default: Any = None, **details: Any) -> None:
        """Add ``--name``."""
        dest = name.replace("-", "_")
        self.defaults[dest] = default
        if dest in self.hidden or not self.is_shown(dest):
            self.left_out += dest not in self.hidden
            help = SUPPRESS
        self._group.add_argument(f"--{name}", help=help, **details)

    def flag(self, name: str, *, help: str, default: bool | None = False) -> None:
        """Add ``--name`` and ``--no-name``."""
        self.option(name, help=help, default=default, action=argparse.BooleanOptionalAction)

    def field(self, config: type, name: str, text: str, shown: str | None) -> None:
        """Add the option of a configuration's field.

        It is None if it is not given: the commands know the defaults. shown: the default that the
        help shows in place of the one in the text, if there is one.
        """
        hint = _hints(config)[name]
        kind = next(kind for kind in (get_args(hint) or (hint,)) if kind is not NoneType)
        option = name.replace("_", "-")
        if shown is not None:
            text = f"{text.partition(' (default')[0]} (default: {shown})"
        if kind is bool:
            self.flag(option, help=text, default=None)
        else:
            metavar = "FILE" if name in FILES else kind.__name__.upper()
            is_text = kind is str and name not in FILES
            self.option(option, help=text, type=as_text if is_text else kind, metavar=metavar)

    def help(self, action: str | type[argparse.Action], has_more: bool) -> None:
        """Add --help, and --help-all if there is more to show."""
        add = self._group.add_argument
        add("-h", "--help", dest="all", action=action, const=False, help="show this help")
        if has_more:
            text = "show all options"
            add("--help-all", dest="all", action=action, const=True, help=text)


def as_text(argument: str) -> str:
    """Return an argument that is not a file name as UTF-8 text, whatever the locale."""
    return argument_bytes(argument).decode("utf-8", "surrogateescape")


@cache
def _hints(config: type) -> dict[str, Any]:
    return get_type_hints(config)


@dataclass(frozen=True)
class Command:
    """A command of ``fused-attn``.

    name: as it is typed. summary: one line about it. usage: what follows its name.
    add: adds its arguments and options, --help included.
    finish: checks the options that are given, by dest, and returns what the command runs with.
    seldom: dests of the options that only --help-all shows.
    hidden: dests of options that exist only for an error that says why they do not apply.
    of_every_task: dests of the options that ``train --help`` shows if no task is given.
    module: the module of this package whose ``run`` runs the command; None means ``name``.
    """

    name: str
    summary: str
    usage: str
    add: Callable[[Options], None]
    finish: Callable[[CommandParser, dict[str, Any]], dict[str, Any]]
    seldom: frozenset[str] = frozenset()
    hidden: frozenset[str] = frozenset()
    of_every_task: frozenset[str] | None = None
    module: str | None = None

    def set_up(self, parser: CommandParser, options: Options) -> None:
        """Give a new parser its options."""
        parser.usage = f"{parser.prog} {self.usage}".rstrip()
        parser.description = self.summary
        parser.set_defaults(command=self, defaults=options.defaults, parser=parser)
        self.add(options)

    def help_text(self, prog: str, *, everything: bool, task: str | None = None) -> str:
        """Return the help text; for ``train``, that of ``task``, or of all tasks if None.

        prog: the command as it is called. everything: whether to show seldom-used options, too.
        """

        def is_shown(dest: str) -> bool:
            if everything:
                return True
            if self.of_every_task is not None and task is None:
                return dest in self.of_every_task
            return dest not in self.seldom

        parser = CommandParser(prog=prog)
        options = Options(parser, is_shown, self.hidden, task)
        self.set_up(parser, options)
        if options.left_out:
            name = prog if task is None else f"{prog} {task}"
            parser.epilog = f"{name} --help-all shows {options.left_out} more options."
        return parser.format_help()


class ShowHelp(argparse.Action):
    """Prints the help, including seldom-used options if ``const`` is true."""

    def __init__(self, **details: Any) -> None:
        super().__init__(nargs=0, **details)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        command: Command = parser.get_default("command")
        print(command.help_text(parser.prog, everything=self.const), end="")
        parser.exit()


def add_machine(options: Options) -> None:
    """Add the machine options, which every command that runs a model has."""
    options.section("machine")
    options.option(
        "device",
        default="auto",
        metavar="NAME",
        help="cpu, cuda, cuda:N (default: a GPU if there is one)",
    )
    options.option(
        "threads", type=int, metavar="N", help="threads of torch (default: one per core)"
    )
    options.option(
        "backend",
        default="auto",
        metavar="NAME",
        help="attention backend, see 'fused-attn info'; other than auto and cpu, searches run step "
        "by step in torch (default: auto)",
    )


def shown_default(values: set[Any]) -> str | None:
    """The default that the help shows, from the defaults of the tasks; None if that is None."""
    if len(values) > 1:
        return "depends on the task"
    (value,) = values
    if value is None:
        return None
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def given_options(namespace: Namespace) -> dict[str, Any]:
    """Return the options that are given, by dest."""
    own = ("command", "defaults", "parser")
    return {name: value for name, value in vars(namespace).items() if name not in own}
