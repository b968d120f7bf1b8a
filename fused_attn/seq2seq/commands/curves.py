"""``fused-attn curves``: plot the training curves of runs."""

from __future__ import annotations

from argparse import Namespace

from fused_attn.seq2seq.errors import InputError


def run(args: Namespace) -> int:
    """Plot the loss and the development metrics of runs."""
    from fused_attn.seq2seq.commands.plots import save_curves  # matplotlib is slow to import

    try:
        save_curves(args.runs, args.output)
    except OSError as error:
        raise InputError(f"cannot write {args.output}: {error.strerror}") from None
    return 0
