"""Uses of alignment weights: links, text output, and copying source symbols for unknown ones."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fused_attn.seq2seq.metrics import Link
from fused_attn.seq2seq.vocabulary import UNKNOWN


def hard_links(weights: Tensor) -> list[Link]:
    """Link each target symbol to the source symbol with the largest of its weights (T, S)."""
    if not weights.numel():
        return []
    return [(int(source), target) for target, source in enumerate(weights.argmax(dim=1))]


def soft_alignment(weights: Tensor) -> str:
    """Format weights (T, S): spaces within the row of a target symbol, tabs between rows."""
    rows = [" ".join(f"{weight:.4f}" for weight in row) for row in weights.tolist()]
    return "\t".join(rows)


def replace_unknown(
    target: Sequence[str], source: Sequence[str], weights: Tensor | None
) -> tuple[str, ...]:
    """Replace each unknown target symbol by the source symbol with the largest weight.

    Luong et al. 2015, section 4.1, without their dictionary. weights: (T, S), or None to replace
    nothing.
    """
    if weights is None or UNKNOWN not in target or not weights.numel():
        return tuple(target)
    copied = {t: source[s] for s, t in hard_links(weights)}
    return tuple(copied[t] if symbol == UNKNOWN else symbol for t, symbol in enumerate(target))
