"""Average the parameters of several models into one model.

Models that were fine-tuned from the same model (`train --start-from`), or checkpoints of one run,
lie in one basin of the loss, and their mean is often better than each of them: Izmailov et al.
2018, "Averaging Weights Leads to Wider Optima and Better Generalization"; Wortsman et al. 2022,
"Model soups". An average runs at the cost of one model, an ensemble at the cost of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.checkpoints.load import check_shapes, load_vocabularies
from fused_attn.seq2seq.checkpoints.recipe import load_recipe
from fused_attn.seq2seq.errors import InputError


def averaged(paths: Sequence[Path]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the metadata of the first checkpoint and the mean of the parameters, in float32.

    Raises `InputError` if a checkpoint is missing or damaged, or if its model or its vocabularies
    differ from those of the first.
    """
    shapes = []
    metas = [files.load_metadata(path) for path in paths]
    for path, meta in zip(paths, metas, strict=True):
        model = load_recipe(path, meta).model
        symbols = [vocabulary.symbols for vocabulary in load_vocabularies(path, meta)]
        # Options that only training uses may differ.
        shapes.append((replace(model, dropout=0.0, variational=False), symbols))
        if shapes[-1][0] != shapes[0][0]:
            raise InputError(f"the model options of {path} differ from those of {paths[0]}")
        if symbols != shapes[0][1]:
            raise InputError(f"the vocabularies of {path} differ from those of {paths[0]}")
    source, target = load_vocabularies(paths[0], metas[0])
    total: dict[str, Tensor] = {}
    for path, meta in zip(paths, metas, strict=True):
        parameters = files.load_tensors(path, files.MODEL, meta)
        check_shapes(path, shapes[0][0], len(source), len(target), parameters)
        for name, tensor in parameters.items():
            # In float64 the mean of one model equals that model bit for bit.
            total[name] = total[name] + tensor if name in total else tensor.double()
    return metas[0], {name: (tensor / len(paths)).float() for name, tensor in total.items()}
