"""Distillation: the probabilities of trained models (teachers) as soft targets for another model.

Hinton, Vinyals & Dean 2015, "Distilling the Knowledge in a Neural Network"; for sequences, Kim &
Rush 2016, "Sequence-Level Knowledge Distillation", sections 2.2 and 3.1. The teachers do not
change, so they run once, before training, and not in every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.data.examples import Examples
from fused_attn.seq2seq.data.soft_targets import SoftTargetTable
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.model.seq2seq import Seq2Seq

FILE = "teacher.safetensors"  # in the directory of a run
# Number of symbols per step whose probabilities are kept. All of a subword vocabulary would be too
# much to store.
KEPT = 8
_BATCH = 256


@torch.no_grad()
def soft_targets(models: Sequence[Seq2Seq], examples: Examples) -> SoftTargetTable:
    """Run the teachers over all pairs and return their mean probabilities.

    models: the teachers, in evaluation mode and on one device.
    """
    device = next(models[0].parameters()).device
    lengths = examples.target_lengths - 1
    kept = min(KEPT, models[0].output.out_features)
    table = SoftTargetTable.empty(lengths, kept)
    # Sorted by length for little padding. Most batches have no padding in the sources, which avoids
    # packing.
    order = lengths.argsort(stable=True)
    order = order[examples.source_lengths[order].argsort(stable=True)]
    for rows in order.split(_BATCH):
        batch = examples.batch(rows).to(device)
        given = batch.source, batch.source_lengths, batch.target[:, :-1]
        each = [model(*given)[0].float().softmax(dim=-1) for model in models]
        likeliest = torch.stack(each).mean(dim=0).topk(kept, dim=-1)
        shares = likeliest.values / likeliest.values.sum(dim=-1, keepdim=True)
        table.fill(rows, likeliest.indices, shares)
    return table


def save(table: SoftTargetTable, directory: Path) -> None:
    """Write soft targets to the directory of a run; raises OSError."""
    tensors = {"symbols": table.symbols, "probabilities": table.probabilities}
    files.save_tensors(directory / FILE, tensors)


def load(directory: Path, examples: Examples) -> SoftTargetTable:
    """Memory-map the soft targets that `save` wrote. Pages are read on demand.

    Raises `InputError` if they are missing or damaged, or do not match ``examples``.
    """
    try:
        tensors = files.map_tensors(directory, FILE)
        lengths = examples.target_lengths - 1
        return SoftTargetTable(tensors["symbols"], tensors["probabilities"], lengths)
    except (files.DamagedError, KeyError, ValueError):
        raise InputError(
            f"the soft targets in {directory / FILE} are missing, or do not belong to this run",
            "start another run with --teacher to compute them",
        ) from None
