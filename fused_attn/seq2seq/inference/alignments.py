"""What alignment weights give: links, text, and source symbols in place of unknown ones."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fused_attn.seq2seq.metrics import Link
from fused_attn.seq2seq.vocabulary import UNKNOWN


def hard_links(weights: Tensor) -> list[Link]:
    """For each target symbol the source symbol with the largest weight, of weights (T, S)."""
    if not weights.numel():
        return []
    return [(int(source), target) for target, source in enumerate(weights.argmax(dim=1))]


def soft_alignment(weights: Tensor) -> str:
    """A row of weights for each target symbol, rows separated by a tab."""
    rows = [" ".join(f"{weight:.4f}" for weight in row) for row in weights.tolist()]
    return "\t".join(rows)


def replace_unknown(
    target: Sequence[str], source: Sequence[str], weights: Tensor | None
) -> tuple[str, ...]:
    """Put the source symbol with the largest weight in place of each unknown target symbol.

    Luong et al. 2015, section 4.1 (there with a dictionary behind it). weights: (T, S).
    """
    if weights is None or UNKNOWN not in target or not weights.numel():
        return tuple(target)
    copied = {place: source[at] for at, place in hard_links(weights)}
    return tuple(
        copied[place] if symbol == UNKNOWN else symbol for place, symbol in enumerate(target)
    )
