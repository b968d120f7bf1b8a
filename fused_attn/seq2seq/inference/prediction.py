"""The prediction for a source, and its display in a notebook."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

# The colour of a weight of 1 in the table, as RGB. Smaller weights are more transparent.
_INK = "31, 119, 180"
# Decimals of the numbers in records: about the precision of float32.
_DECIMALS = 6


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
    source_text: the source as it was given; as the task shows it if it was given as tokens.
    """

    source: tuple[str, ...]
    tokens: tuple[str, ...]
    text: str
    score: float
    token_scores: tuple[float, ...] = ()
    ranking_score: float = 0.0
    alignment: Tensor | None = field(default=None, compare=False)
    others: tuple[Prediction, ...] = field(default=(), repr=False)
    source_text: str = field(default="", compare=False)

    @property
    def alternatives(self) -> tuple[Prediction, ...]:
        """The n best predictions for the source, best first, starting with this one."""
        return (self, *self.others)

    def as_dict(self, alignment: bool = False) -> dict[str, Any]:
        """Return the prediction and its alternatives as JSON values.

        This is what ``fused-attn predict --format json`` prints. Numbers are rounded to six
        decimals; one that is not finite is None.

        Keys: "source", "source_tokens" and "targets", a list of the alternatives, best first. Each
        has "rank" (from 1), "target" (its text), "tokens", "log_prob" (nats, end of sequence
        included) and "token_log_probs" (nats, one per token).

        alignment: whether each alternative also has "alignment", the weights (T, S) as lists, one
            per target token; None without weights.
        """
        targets = []
        for rank, each in enumerate(self.alternatives, start=1):
            target: dict[str, Any] = {
                "rank": rank,
                "target": each.text,
                "tokens": list(each.tokens),
                "log_prob": rounded(each.score),
                "token_log_probs": [rounded(score) for score in each.token_scores],
            }
            if alignment:
                weights = None if each.alignment is None else each.alignment.tolist()
                target["alignment"] = weights and [[rounded(w) for w in row] for row in weights]
            targets.append(target)
        return {
            "source": self.source_text,
            "source_tokens": list(self.source),
            "targets": targets,
        }

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


def rounded(value: float) -> float | None:
    """Return a number for a record: six decimals, None if it is not finite."""
    return round(value, _DECIMALS) + 0.0 if math.isfinite(value) else None  # never -0.0


def _row(token: str, weights: Sequence[float]) -> str:
    cells = "".join(
        f'<td title="{weight:.3f}" style="background: rgba({_INK}, {weight:.3f})">&nbsp;</td>'
        for weight in weights
    )
    return f"<tr><th>{html.escape(token)}</th>{cells}</tr>"
