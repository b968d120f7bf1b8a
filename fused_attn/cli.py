"""The ``fused-attn`` command: its arguments, errors and exit codes.

The exit codes are in `EXIT_CODES`. Input and output are UTF-8 in every locale.
Nothing heavy is imported before the options are read, so that help and errors appear at once.
"""

from __future__ import annotations

import importlib
import os
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence

from fused_attn import __version__
from fused_attn.seq2seq.commands.arguments import COMMANDS
from fused_attn.seq2seq.commands.parser import (
    INCOMPLETE,
    USAGE_ERROR,
    Command,
    CommandParser,
    Options,
    Parser,
    given_options,
)
from fused_attn.seq2seq.commands.streams import utf8_streams
from fused_attn.seq2seq.errors import InputError

INTERRUPTED = 130
# What a shell reports for a program that SIGPIPE killed.
PIPE_CLOSED = 141
EXIT_CODES = f"""exit codes:
  0    success
  {INCOMPLETE}    predict: done, but some sources could not be read
  {USAGE_ERROR}    failed; one line on standard error says why
  {INTERRUPTED}  interrupted (SIGINT or SIGTERM); a training can be resumed
  {PIPE_CLOSED}  the reader of the output has gone
"""


# What the errors of torch and its backends say when memory cannot be allocated.
_NO_MEMORY = (
    "out of memory",
    "allocate memory",
    "not enough memory",
    "ALLOC_FAILED",
    "size calculation overflowed",
)


def make_parser() -> Parser:
    """Return the parser. `parse` turns its namespace into the arguments of a command."""
    parser = Parser(
        prog="fused-attn",
        description="Fused Luong attention: train and use sequence-to-sequence models.",
        epilog=EXIT_CODES,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fused-attn {__version__}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=CommandParser
    )
    for command in COMMANDS:
        added = commands.add_parser(command.name, help=command.summary)
        command.set_up(added, Options(added))
    return parser


def parse(argv: Sequence[str]) -> Namespace:
    """Read the arguments of ``fused-attn``: ``command`` and its options, given or by default.

    Raises `InputError` if options contradict one another, SystemExit if they cannot be read or
    only ask for help.
    """
    read = make_parser().parse_args(argv)
    command: Command = read.command
    given = command.finish(read.parser, given_options(read))
    return Namespace(command=command, **{**read.defaults, **given})


def _run(args: Namespace) -> int:
    command: Command = args.command
    if command.name == "info":  # the only command that is not part of the toolkit
        from fused_attn import info

        return info.main()
    name = command.module or command.name
    code: int = importlib.import_module(f"fused_attn.seq2seq.commands.{name}").run(args)
    return code


def _discard_output() -> None:
    """Drop unwritten output: the interpreter would try to write it once more when it exits."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``argv`` (the process's arguments if None); return its exit code."""
    with utf8_streams():
        return _main(sys.argv[1:] if argv is None else argv)


def _main(argv: Sequence[str]) -> int:
    try:
        code = _run(parse(argv))
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a closed pipe can still be handled
    except InputError as error:
        return _fail(error.on_the_command_line)
    except ModuleNotFoundError as error:
        package = (error.name or "fused_attn").partition(".")[0]
        if package == "fused_attn":
            raise
        install = "pip install 'fused-attn[seq2seq]'"
        return _fail(f"{package} is not installed: {install}")
    except BrokenPipeError:  # the reader of the output has gone
        _discard_output()
        return PIPE_CLOSED
    except OSError as error:
        _discard_output()
        # Whatever writes a file names it.
        place = error.filename or "standard output"
        return _fail(f"{place}: {error.strerror or error}")
    except UnicodeEncodeError as error:
        if error.encoding != sys.getfilesystemencoding():
            raise
        return _fail(f"this locale has no file name {error.object}: set LC_ALL=C.UTF-8")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(t in str(error) for t in _NO_MEMORY):
            raise
        trains = list(argv[:1]) == ["train"]
        options = "--batch-size, --batch-tokens or --hidden" if trains else "--beam"
        return _fail(f"not enough memory; a smaller {options} needs less")
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


def _fail(message: str) -> int:
    if sys.stderr is not None:  # print() would take standard output instead
        print(f"fused-attn: error: {message}", file=sys.stderr)
    return USAGE_ERROR
