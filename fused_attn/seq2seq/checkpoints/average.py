"""One model of several: the mean of their parameters.

Of trainings that began at one model (`train --start-from`), or of checkpoints of one training, the
mean lies between them in one valley of the loss and is often better than each: Izmailov et al.
2018, "Averaging Weights Leads to Wider Optima and Better Generalization"; Wortsman et al. 2022,
"Model soups". It costs what one model costs, where an ensemble costs them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.checkpoints.load import load_vocabularies
from fused_attn.seq2seq.checkpoints.recipe import load_recipe
from fused_attn.seq2seq.errors import InputError


def averaged(places: Sequence[Path]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the metadata of the first checkpoint and the mean of all their parameters.

    Raises `InputError` if one is missing or damaged, or of another model than the first.
    """
    shapes = []
    for place in places:
        meta = files.load_metadata(place)
        model = load_recipe(place, meta).model
        symbols = [vocabulary.symbols for vocabulary in load_vocabularies(place, meta)]
        # What only a training does may differ.
        shapes.append((replace(model, dropout=0.0, variational=False), symbols))
        if shapes[-1][0] != shapes[0][0]:
            raise InputError(f"{place} is a model of other options than {places[0]}")
        if symbols != shapes[0][1]:
            raise InputError(f"{place} has other vocabularies than {places[0]}")
    total: dict[str, Tensor] = {}
    for place in places:
        parameters = files.load_tensors(place, files.MODEL)
        if total and parameters.keys() != total.keys():
            raise files.damaged(place, ValueError("it has other parameters"))
        for name, tensor in parameters.items():
            # Summed in float64, a mean of one is that one to the bit.
            total[name] = total[name] + tensor if name in total else tensor.double()
    return files.load_metadata(places[0]), {
        name: (tensor / len(places)).float() for name, tensor in total.items()
    }
