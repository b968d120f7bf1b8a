"""Pictures of alignments."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fused_attn.seq2seq.checkpoint import write_atomically
from fused_attn.seq2seq.inference import Prediction

_INCHES_PER_SYMBOL = 0.32
_MARGIN_INCHES = 1.1


def alignment_figure(predictions: Sequence[Prediction]) -> Figure:
    """Return a figure with a heat map for each prediction, one below the other.

    A map has the source's symbols along the top and the target's down the side; the darker a cell,
    the more of the weight a_t of that target symbol lies on that source symbol. The predictions
    need their weights, and a target that is not empty.
    """
    widths = [len(p.source) * _INCHES_PER_SYMBOL + _MARGIN_INCHES for p in predictions]
    heights = [len(p.target) * _INCHES_PER_SYMBOL + _MARGIN_INCHES for p in predictions]
    figure = Figure(figsize=(max(widths), sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(predictions), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, prediction in zip(panels, predictions, strict=True):
        if prediction.weights is None:
            raise ValueError("a prediction has no alignment weights")
        axes.imshow(prediction.weights.numpy(), cmap="Blues", vmin=0.0, vmax=1.0, aspect="equal")
        axes.set_xticks(range(len(prediction.source)), prediction.source)
        axes.set_yticks(range(len(prediction.target)), prediction.target)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
    return figure


def save_alignments(predictions: Sequence[Prediction], path: Path) -> None:
    """Write `alignment_figure` to a PNG file that is whole or not there; raises OSError."""
    buffer = io.BytesIO()
    alignment_figure(predictions).savefig(buffer, format="png", dpi=150)
    write_atomically(path, buffer.getvalue())
