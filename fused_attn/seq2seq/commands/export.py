"""``fused-attn export``: write the model of a checkpoint without its training state."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from fused_attn.seq2seq.checkpoints.average import averaged
from fused_attn.seq2seq.checkpoints.export import save_model
from fused_attn.seq2seq.checkpoints.find import find_checkpoint
from fused_attn.seq2seq.errors import InputError


def run(args: Namespace) -> int:
    """Write a model, or the average of several, for prediction only."""
    directory: Path = args.output
    if directory.exists():
        raise InputError(f"--output: {directory} already exists")
    meta, parameters = averaged([find_checkpoint(model) for model in (args.model, *args.average)])
    if args.average:  # the metrics of the first model are not those of the average
        meta.pop("dev", None)
    save_model(directory, meta, parameters, args.store)
    size = sum(file.stat().st_size for file in directory.iterdir())
    print(f"{directory}: {size / 1e6:.1f} MB")
    return 0
