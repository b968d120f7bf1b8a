"""Give a trained model rows for new symbols of its vocabularies."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_SOURCE, _TARGET = "source_embedding.weight", "target_embedding.weight"
_OUTPUT = ("output.weight", "output.bias")
_SPECIAL = 3  # PAD, BOS and EOS


def extended(
    parameters: Mapping[str, Tensor], fresh: Mapping[str, Tensor], tied: bool
) -> dict[str, Tensor]:
    """Return parameters for larger vocabularies, whose new symbols come last.

    parameters: of the trained model. fresh: of a newly initialised model with the larger
    vocabularies; its other widths may differ. tied: whether an embedding is also the weight of the
    output layer.

    All old rows stay as they are. New rows of an embedding have their initial values. New rows of
    the output layer are the mean of the old symbols' rows, so that new symbols begin with the mean
    logit and take little probability from the old ones (Hewitt 2021, "Initializing New Word
    Embeddings for Pretrained Language Models").

    Raises KeyError if a parameter is missing, ValueError if a vocabulary is smaller than before.
    """
    found = dict(parameters)
    for name in (_SOURCE, _TARGET, *_OUTPUT):
        old, size = parameters[name], len(fresh[name])
        if size < len(old):
            raise ValueError(f"{name} has {len(old)} rows, more than the {size} symbols")
        if size == len(old):
            continue
        # Tied weights are one tensor, stored under each of their names.
        if name in _OUTPUT or (tied and old.equal(parameters["output.weight"])):
            symbols = old[_SPECIAL:].float()
            mean = symbols.mean(dim=0, keepdim=True) if len(symbols) else old[:1].float() * 0
            rows = mean.expand(size - len(old), *old.shape[1:])
        else:
            rows = fresh[name][len(old) :]
        found[name] = torch.cat((old, rows.to(old.dtype)))
    return found
