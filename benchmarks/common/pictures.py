"""Pictures that are the same bytes for the same figures."""

from __future__ import annotations

import io
from contextlib import AbstractContextManager

from matplotlib import rc_context
from matplotlib.figure import Figure

METADATA = {"Date": None}


def reproducible() -> AbstractContextManager[None]:
    """A context in which SVG files keep text as text and have element ids that do not change."""
    return rc_context({"svg.fonttype": "none", "svg.hashsalt": "fused_attn"})


def svg(figure: Figure) -> str:
    """The figure as an SVG element on a transparent ground."""
    buffer = io.StringIO()
    with reproducible():
        figure.savefig(buffer, format="svg", metadata=METADATA, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
