"""``fused-attn export``: the model of a checkpoint without its training state."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.checkpoints.average import averaged
from fused_attn.seq2seq.checkpoints.compress import narrowed
from fused_attn.seq2seq.checkpoints.find import find_checkpoint
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.tasks.registry import TASKS
from fused_attn.seq2seq.training.run import START_FROM, TEACHER


def run(args: Namespace) -> int:
    """``fused-attn export``: write the model of a checkpoint, to be used and not trained on."""
    directory: Path = args.output
    if directory.exists():
        raise InputError(f"--output: {directory} is already there")
    meta, parameters = averaged([find_checkpoint(model) for model in (args.model, *args.average)])
    # What a training goes on from is not needed any more; of a mean nothing has been measured.
    left = {"position", "format_version", START_FROM, TEACHER} | (
        {"dev"} if args.average else set()
    )
    kept = {key: value for key, value in meta.items() if key not in left}
    kept["task"] = kept["task"] | dict.fromkeys(TASKS[kept["task"]["name"]].only_trained_on)
    files.save(directory, kept, narrowed(parameters, args.store), None)
    size = sum(file.stat().st_size for file in directory.iterdir())
    print(f"{directory}: {size / 1e6:.1f} MB")
    return 0
