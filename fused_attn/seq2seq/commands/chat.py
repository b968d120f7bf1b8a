"""``fused-attn chat``: answer lines typed by the user."""

from __future__ import annotations

import sys
from argparse import Namespace

from fused_attn.seq2seq.commands.options import (
    load_models,
    note,
    search_config,
    set_threads,
    tell,
)
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.inference.records import read_line


def run(args: Namespace) -> int:
    """Answer each line of standard input until it ends."""
    set_threads(args.threads)
    search = search_config(args)
    predictor = load_models(args)
    if sys.stdin is None:
        raise InputError("there is no standard input")
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401, gives input() a history

        tell("Type a message; Ctrl-D exits.")
    while True:
        try:
            text = input("> " if interactive else "")
        except EOFError:
            print(end="\n" if interactive else "")
            return 0
        line = read_line(predictor, text.encode("utf-8", "surrogateescape"))
        if line.error is not None:
            note(line.problem("this message"))
        if line.source is None:
            continue
        for about in predictor.notes("this message", line.source):
            note(about)
        (found,) = predictor.decode([line.source], search)
        print(found.text, flush=True)
