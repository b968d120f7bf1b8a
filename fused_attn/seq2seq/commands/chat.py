"""``fused-attn chat``: answer lines typed by the user."""

from __future__ import annotations

import sys
from argparse import Namespace

from fused_attn.seq2seq.commands.options import load_models, note, search_config, set_threads
from fused_attn.seq2seq.errors import InputError


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

        print("Type a message; Ctrl-D exits.")
    while True:
        try:
            text = input("> " if interactive else "")
        except EOFError:
            print(end="\n" if interactive else "")
            return 0
        except UnicodeDecodeError:
            raise InputError("standard input is not UTF-8 text") from None
        if not predictor.read(text):
            continue
        try:
            (found,) = predictor.predict([text], search)
        except InputError as error:  # an unknown symbol
            note(str(error))
            continue
        print(found.text, flush=True)
