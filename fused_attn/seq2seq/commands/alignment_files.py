"""The file that ``predict --alignments`` writes: a picture, or text with one line per source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fused_attn.seq2seq.data.links import pharaoh
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.inference.alignments import hard_links, soft_alignment
from fused_attn.seq2seq.inference.prediction import Prediction
from fused_attn.seq2seq.outputs import write_atomically

# Largest number of heat maps in a picture.
MAX_PANELS = 12
# File name endings: a picture, or a text file.
PICTURES, TEXTS = (".png", ".svg"), (".pharaoh", ".soft")


def check_name(path: Path) -> None:
    """Raise `InputError` if the file cannot be written for its name."""
    if path.suffix.lower() not in (*PICTURES, *TEXTS):
        endings = ", ".join((*PICTURES, *TEXTS))
        raise InputError(f"--alignments must be a file name ending in one of {endings}, got {path}")
    if not path.parent.is_dir():
        raise InputError(f"--alignments: there is no directory {path.parent}")


class AlignmentFile:
    """Collects the alignments of best targets, and writes them at the end.

    path: a name that `check_name` accepts.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kind = path.suffix.lower()
        self._lines: list[str] = []  # of a text file
        self._drawn: list[Prediction] = []  # in a picture
        self._count = 0  # sources with a prediction

    def add(self, predictions: Sequence[Prediction | None]) -> None:
        """Add predictions. None gives an empty line, and is not drawn."""
        for found in predictions:
            self._count += found is not None
            if self._kind in TEXTS:
                self._lines.append("" if found is None else _line(found, self._kind))
            elif found is not None and found.tokens and len(self._drawn) < MAX_PANELS:
                self._drawn.append(found)

    def write(self) -> str | None:
        """Write the file; returns what to tell about a picture that does not show all sources.

        Raises `InputError` if it cannot be written, or if there is nothing to draw.
        """
        try:
            if self._kind in TEXTS:
                text = "".join(f"{line}\n" for line in self._lines)
                write_atomically(self._path, text.encode())
                return None
            from fused_attn.seq2seq.commands.plots import (
                save_alignments,  # matplotlib is slow to import
            )

            if not self._drawn:
                raise InputError("--alignments: nothing to draw, all targets are empty")
            save_alignments(self._drawn, self._path)
        except OSError as error:
            raise InputError(f"cannot write {self._path}: {error.strerror}") from None
        if len(self._drawn) == self._count:
            return None
        return f"{self._path} shows the first {len(self._drawn)} of {self._count} sources"


def _line(found: Prediction, kind: str) -> str:
    assert found.alignment is not None
    if kind == ".soft":
        return soft_alignment(found.alignment)
    return pharaoh(hard_links(found.alignment))
