"""What the commands make of the options that several of them have."""

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
    """Return the model of ``args.model``, or its ensemble with those of ``args.ensemble``."""
    device = choose_device(own_device(args.device))
    return load(args.model, *args.ensemble, backend=args.backend, device=device)


def search_config(args: Namespace) -> SearchConfig:
    """Return the search that was asked for; raises `InputError`."""
    given = {f.name: getattr(args, f.name) for f in fields(SearchConfig)}
    try:
        return SearchConfig(**{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise as_option(error) from None


def as_option(error: ValueError) -> InputError:
    """The message of a configuration, which begins with the field's name, as one of an option."""
    name, _, rest = str(error).partition(" ")
    return OptionError(name, rest)


def set_threads(threads: int | None) -> None:
    """Let torch use so many threads; raises `InputError`."""
    if threads is None:
        return
    if threads < 1:
        raise InputError(f"--threads must be a positive number, got {threads}")
    torch.set_num_threads(threads)


def note(text: str) -> None:
    """Tell people what is odd."""
    print(f"note: {text}", file=sys.stderr)
