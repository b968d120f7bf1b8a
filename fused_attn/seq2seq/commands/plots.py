"""Plots of alignments and of training curves."""

from __future__ import annotations

import io
import sys
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from pathlib import Path

from matplotlib import font_manager, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.inference.prediction import Prediction
from fused_attn.seq2seq.metrics import PERPLEXITY
from fused_attn.seq2seq.outputs import write_atomically
from fused_attn.seq2seq.training.logs import EPOCHS, STEPS, read_table

# In inches: the side of a cell, the room left of a map and above it, the margin, a letter.
_CELL, _LEFT, _TOP, _EDGE, _LETTER = 0.32, 0.6, 0.45, 0.15, 0.1


def font_families(text: Iterable[str]) -> tuple[list[str], set[str]]:
    """Return font families that cover the characters of a text, and the characters not covered.

    Matplotlib's own font comes first. System fonts are searched for characters it does not have.
    """
    own = font_manager.findfont("DejaVu Sans")
    families = ["DejaVu Sans"]
    missing = {c for c in text if not c.isspace()} - _characters(own)
    for path in sorted(font_manager.findSystemFonts()) if missing else ():
        try:
            found = missing & _characters(path)
        except (OSError, RuntimeError):  # FreeType cannot read it
            continue
        if found:
            font_manager.fontManager.addfont(path)
            families.append(font_manager.get_font(path).family_name)
            missing -= found
        if not missing:
            break
    return families, missing


def _characters(path: str) -> set[str]:
    return {chr(code) for code in font_manager.get_font(path).get_charmap()}


def alignment_figure(predictions: Sequence[Prediction]) -> Figure:
    """Return a figure with a heat map of the alignment of each prediction, one below the other.

    Source tokens are along the top, target tokens down the side. The darker a cell, the larger the
    weight of that target token on that source token. Targets must not be empty.

    Raises ValueError if a prediction has no alignment.
    """
    upright = max(map(_letters, chain(*(p.source for p in predictions))), default=0) <= 2
    top = max((_letters(s) for p in predictions for s in p.source), default=0) * _LETTER + _EDGE
    top = _TOP if upright else max(_TOP, top)
    left = max((_letters(s) for p in predictions for s in p.tokens), default=0) * _LETTER + _EDGE
    left = max(_LEFT, left)
    width = left + _CELL * max(len(p.source) for p in predictions) + _EDGE
    height = sum(top + _CELL * len(p.tokens) for p in predictions) + _EDGE
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    bottom = height
    for prediction in predictions:
        if prediction.alignment is None:
            raise ValueError("a prediction has no alignment weights")
        across, down = _CELL * len(prediction.source), _CELL * len(prediction.tokens)
        bottom -= top + down
        axes = figure.add_axes((left / width, bottom / height, across / width, down / height))
        axes.imshow(prediction.alignment.numpy(), cmap="Blues", vmin=0.0, vmax=1.0)
        angle = 0 if upright else 90
        axes.set_xticks(range(len(prediction.source)), prediction.source, rotation=angle)
        axes.set_yticks(range(len(prediction.tokens)), prediction.tokens)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
    return figure


def _letters(symbol: str) -> int:
    """The display width of a symbol in letters; wide East Asian characters count twice."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in symbol)


def curves_figure(runs: Sequence[Path]) -> Figure:
    """Return a figure with the loss of each step, and each metric after each epoch, of all runs.

    Raises `InputError` if a directory has no training log that can be read. Prints a note if only a
    part of it can be read.
    """
    steps = {run: _rows(run / STEPS) for run in runs}
    epochs = {run: _rows(run / EPOCHS) for run in runs}
    for run, rows in steps.items():
        if not rows:
            raise InputError(f"{run} has no training log: {STEPS} is missing or empty")
        if "loss" not in rows[0]:
            raise InputError(f"{run / STEPS} is not a training log: it has no column loss")
    others = ("epoch", "step", "train_loss", "seconds")
    metrics = list(
        dict.fromkeys(n for rows in epochs.values() for r in rows for n in r if n not in others)
    )
    figure = Figure(figsize=(6.4, 2.6 * (1 + len(metrics))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1 + len(metrics), squeeze=False)[:, 0]
    for run in runs:
        x = [int(row["step"]) for row in steps[run]]
        loss = _smooth([float(row["loss"]) for row in steps[run]])
        axes[0].plot(x, loss, label=run.name, linewidth=1.2)
        for panel, name in zip(axes[1:], metrics, strict=True):
            rows = [row for row in epochs[run] if name in row]
            values = [float(row[name]) * (1 if name == PERPLEXITY else 100) for row in rows]
            panel.plot([int(row["step"]) for row in rows], values, marker=".", label=run.name)
    axes[0].set_ylabel("loss, nats per symbol")
    axes[0].set_yscale("log")
    for panel, name in zip(axes[1:], metrics, strict=True):
        panel.set_ylabel(name if name == PERPLEXITY else f"{name}, %")
    for panel in axes:
        panel.grid(alpha=0.3)
    axes[-1].set_xlabel("step")
    if len(runs) > 1:
        axes[0].legend()
    return figure


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        table = read_table(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if table.unreadable and not table.rows:
        raise InputError(f"{path} is not a training log, or is damaged: no line can be read")
    if table.unreadable:
        print(f"note: {path}: {table.unreadable} of its lines cannot be read", file=sys.stderr)
    return table.rows


def _smooth(values: Sequence[float]) -> list[float]:
    """The running mean over a window of a fiftieth of the values."""
    width = max(1, len(values) // 50)
    sums = [0.0, *accumulate(values)]
    return [(sums[i] - sums[max(0, i - width)]) / min(i, width) for i in range(1, len(values) + 1)]


def save_curves(runs: Sequence[Path], path: Path) -> None:
    """Write `curves_figure` to a PNG or SVG file atomically; raises `InputError` or OSError."""
    _save(curves_figure(runs), path)


def save_alignments(predictions: Sequence[Prediction], path: Path) -> None:
    """Write `alignment_figure` to a PNG or SVG file atomically.

    Prints a note if a PNG has a character that no font of this machine has.

    Raises `InputError` if ``path`` ends in neither .png nor .svg, OSError if it cannot be written.
    """
    symbols = (symbol for p in predictions for symbol in (*p.source, *p.tokens))
    families, missing = font_families("".join(symbols))
    if missing and path.suffix.lower() == ".png":  # the viewer of an SVG may have the font
        shown = "".join(sorted(missing)[:10])
        print(
            f"note: no font on this machine has the characters {shown}; install Noto fonts",
            file=sys.stderr,
        )
    with rc_context({"font.family": families}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the note reports them
        _save(alignment_figure(predictions), path)


def _save(figure: Figure, path: Path) -> None:
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise InputError(f"--output must be a file name ending in .png or .svg, got {path}")
    buffer = io.BytesIO()
    # Text remains text, and equal figures give equal files.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fused_attn"}):
        figure.savefig(buffer, format=kind, dpi=150)
    write_atomically(path, buffer.getvalue())
