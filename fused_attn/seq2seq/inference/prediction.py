"""A prediction, and how a notebook shows it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

# The colour of a weight of 1 in a table; a lighter weight shows more of the page behind it.
_INK = "31, 119, 180"


@dataclass(frozen=True)
class Prediction:
    """A target that was found for a source.

    source: the tokens that were read.
    tokens: the target.
    text: the target as text.
    score: log probability of the target in nats, its end included.
    token_scores: log probability of each token; the rest of ``score`` is that of the end.
    ranking_score: what hypotheses are ranked by: ``score`` with length and coverage penalties.
    alignment: attention weights, float32 (T, S), a row for each target token; None if they were not
        asked for, or the model has no attention.
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
        """The n best predictions for the source, best first; this one is the first of them."""
        return (self, *self.others)

    def __repr__(self) -> str:
        more = f", {len(self.others)} more alternatives" if self.others else ""
        return f"Prediction({self.text!r}, score={self.score:.4g}{more})"

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        """The alignment as a table: a row for each target token, a column for each source token.

        The darker a cell, the larger the weight.
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
