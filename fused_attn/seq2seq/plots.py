"""Pictures of alignments."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fused_attn.seq2seq.checkpoint import write_atomically
from fused_attn.seq2seq.inference import Prediction

# Inches: the side of a cell, room for the phones beside a map and for the letters above it.
_CELL, _LEFT, _TOP, _EDGE = 0.32, 0.6, 0.45, 0.15


def alignment_figure(predictions: Sequence[Prediction]) -> Figure:
    """Return a figure with a heat map for each prediction, one below the other.

    A map has the source's symbols along the top and the target's down the side; the darker a cell,
    the more of the weight a_t of that target symbol lies on that source symbol. The predictions
    need their weights, and a target that is not empty.
    """
    width = _LEFT + _CELL * max(len(p.source) for p in predictions) + _EDGE
    height = sum(_TOP + _CELL * len(p.target) for p in predictions) + _EDGE
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    bottom = height
    for prediction in predictions:
        if prediction.weights is None:
            raise ValueError("a prediction has no alignment weights")
        across, down = _CELL * len(prediction.source), _CELL * len(prediction.target)
        bottom -= _TOP + down
        axes = figure.add_axes((_LEFT / width, bottom / height, across / width, down / height))
        axes.imshow(prediction.weights.numpy(), cmap="Blues", vmin=0.0, vmax=1.0)
        axes.set_xticks(range(len(prediction.source)), prediction.source)
        axes.set_yticks(range(len(prediction.target)), prediction.target)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
    return figure


def save_alignments(predictions: Sequence[Prediction], path: Path) -> None:
    """Write `alignment_figure` to a file that is whole or not there; raises OSError.

    A PNG, or an SVG for a path that ends so.
    """
    buffer = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fused_attn"}):  # text stays text
        kind = path.suffix.lower().removeprefix(".")
        alignment_figure(predictions).savefig(buffer, format=kind, dpi=150)
    write_atomically(path, buffer.getvalue())
