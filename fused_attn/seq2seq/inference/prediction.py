"""The prediction for a source, and its display in a notebook."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

# The colour of a weight of 1 in the table, as RGB. Smaller weights are more transparent.
_INK = "31, 119, 180"


@dataclass(frozen=True)
class Prediction:
    """A target found for a source.

    source: the S source tokens.
    tokens: the T target tokens.
    text: the target as text.
    score: log probability of the target, end of sequence included, in nats.
    token_scores: log probability of each token in nats; the rest of ``score`` is that of the end of
        sequence.
    ranking_score: ``score`` with length and coverage penalties; alternatives are ranked by it.
    alignment: attention weights, float32 (T, S), one row per target token; None if they were not
        asked for or the model has no attention.
    others: the other predictions for the source, with ``nbest`` > 1; see `alternatives`.
    """

    source: tuple[str, ...]
    tokens: tuple[str, ...]
    text: str
    score: float
    token_scores: tuple[float, ...] = ()
    ranking_score: float = 0.0
    alignment: Tensor | None = field(default=None, compare=False)
    others: tuple[Prediction, ...] = field(default=(), repr=False)

    @property
    def alternatives(self) -> tuple[Prediction, ...]:
        """The n best predictions for the source, best first, starting with this one."""
        return (self, *self.others)

    def __repr__(self) -> str:
        more = f", {len(self.others)} more alternatives" if self.others else ""
        return f"Prediction({self.text!r}, score={self.score:.4g}{more})"

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        """Return the alignment as an HTML table: target tokens down, source tokens across.

        The darker a cell, the larger its weight.
        """
        title = f"<b>{html.escape(self.text)}</b> (log probability {self.score:.3f})"
        if self.alignment is None or not self.alignment.numel():
            return f"<div>{title}</div>"
        head = "".join(f"<th>{html.escape(token)}</th>" for token in self.source)
        rows = zip(self.tokens, self.alignment.tolist(), strict=True)
        body = "".join(_row(token, weights) for token, weights in rows)
        return f"<div>{title}<table><tr><th></th>{head}</tr>{body}</table></div>"


def _row(token: str, weights: Sequence[float]) -> str:
    cells = "".join(
        f'<td title="{weight:.3f}" style="background: rgba({_INK}, {weight:.3f})">&nbsp;</td>'
        for weight in weights
    )
    return f"<tr><th>{html.escape(token)}</th>{cells}</tr>"
