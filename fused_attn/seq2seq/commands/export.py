"""``fused-attn export``: write the model of a checkpoint without its training state."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

from fused_attn.seq2seq.checkpoints.average import averaged
from fused_attn.seq2seq.checkpoints.export import save_model
from fused_attn.seq2seq.checkpoints.find import find_checkpoint
from fused_attn.seq2seq.errors import InputError


def run(args: Namespace) -> int:
    """Write a model, or the average of several, for prediction only."""
    directory: Path = args.output
    if os.path.lexists(directory):
        raise InputError(f"--output: {directory} already exists")
    meta, parameters = averaged([find_checkpoint(model) for model in (args.model, *args.average)])
    if args.average:  # the metrics of the first model are not those of the average
        meta.pop("dev", None)
    try:
        save_model(directory, meta, parameters, args.store)
    except OSError as error:
        raise InputError(f"cannot write {directory}: {error.strerror}") from None
    size = sum(file.stat().st_size for file in directory.iterdir())
    print(f"{directory}: {size / 1e6:.1f} MB")
    return 0
