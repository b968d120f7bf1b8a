"""Options that several commands share."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import fields

import torch

from fused_attn.seq2seq.config import SearchConfig
from fused_attn.seq2seq.devices import choose_device, own_device
from fused_attn.seq2seq.errors import InputError, OptionError
from fused_attn.seq2seq.inference.predictor import Predictor, load


def load_models(args: Namespace) -> Predictor:
    """Load ``args.model``, or an ensemble of it and the models in ``args.ensemble``."""
    device = choose_device(own_device(args.device))
    return load(
        args.model, *args.ensemble, backend=args.backend, device=device, compute=args.compute
    )


def search_config(args: Namespace) -> SearchConfig:
    """Return the search configuration that the options give; raises `InputError`."""
    given = {f.name: getattr(args, f.name) for f in fields(SearchConfig)}
    try:
        return SearchConfig(**{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise as_option(error) from None


def as_option(error: ValueError) -> InputError:
    """Turn the error of a configuration, whose message begins with the field, into an option's."""
    name, _, rest = str(error).partition(" ")
    return OptionError(name, rest)


def set_threads(threads: int | None) -> None:
    """Set the number of threads of torch, None for its default; raises `InputError`."""
    if threads is None:
        return
    if threads < 1:
        raise InputError(f"--threads must be a positive number, got {threads}")
    torch.set_num_threads(threads)


def note(text: str) -> None:
    """Print a note to standard error."""
    tell(f"note: {text}")


def tell(text: str) -> None:
    """Print a line to standard error, if that is open."""
    if sys.stderr is not None:  # print() would take standard output instead
        print(text, file=sys.stderr, flush=True)
