"""``fused-attn chat``: answer what is typed."""

from __future__ import annotations

import sys
from argparse import Namespace

from fused_attn.seq2seq.commands.options import load_models, note, search_config, set_threads
from fused_attn.seq2seq.errors import InputError


def run(args: Namespace) -> int:
    """``fused-attn chat``: answer lines until there are no more."""
    set_threads(args.threads)
    search = search_config(args)
    predictor = load_models(args)
    asks = sys.stdin.isatty()
    if asks:
        import readline  # noqa: F401, input() has a history with it

        print("Say something; Ctrl-D ends it.")
    while True:
        try:
            text = input("> " if asks else "")
        except EOFError:
            print(end="\n" if asks else "")
            return 0
        except UnicodeDecodeError:
            raise InputError("a line is not UTF-8 text") from None
        source = predictor.read(text)
        if not source:
            continue
        try:
            (found,) = predictor.predict([source], search)
        except InputError as error:  # a symbol that the model does not know
            note(str(error))
            continue
        print(found.text, flush=True)
