"""The logs of a run: CSV files with its steps and epochs, and events for TensorBoard.

DIR/steps.csv    step, epoch, loss (nats per symbol), lr, tokens, sampling
DIR/epochs.csv   epoch, step, train_loss, metrics on the development set, seconds
DIR/tensorboard  the same numbers, if asked for
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

from fused_attn.seq2seq.outputs import write_atomically

if TYPE_CHECKING:
    from fused_attn.seq2seq.training.trainer import Position, StepReport

STEPS, EPOCHS = "steps.csv", "epochs.csv"
TENSORBOARD = "tensorboard"

Row = Mapping[str, object]


class RunLog:
    """Writes the logs of a run; a context manager around its training.

    Args:
        directory: of the run.
        position: where training starts or resumes. Rows of later steps, from a process that was
            killed, are removed.
        tensorboard: whether to write events for TensorBoard, too.
    """

    def __init__(self, directory: Path, position: Position, *, tensorboard: bool = False) -> None:
        self._directory = directory
        self._position = position
        self._tensorboard = tensorboard
        self._events: Any = None
        self._files = ExitStack()
        self._writers: dict[str, tuple[TextIO, csv.DictWriter[str]]] = {}

    def __enter__(self) -> Self:
        for name, column, last in (
            (STEPS, "step", self._position.step),
            (EPOCHS, "epoch", self._position.epoch),
        ):
            _tidy(self._directory / name, column, last)
        if self._tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

            self._events = SummaryWriter(
                self._directory / TENSORBOARD, purge_step=self._position.step + 1
            )
            self._files.callback(self._events.close)
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def step(self, report: StepReport) -> None:
        """Log a step."""
        self._write(STEPS, asdict(report))
        if self._events is not None:
            for name in ("loss", "lr", "sampling"):
                self._events.add_scalar(f"train/{name}", getattr(report, name), report.step)

    def epoch(self, values: Row) -> None:
        """Log an epoch. ``values`` has the keys "epoch" and "step", and always the same others."""
        self._write(EPOCHS, values)
        if self._events is not None:
            for name, value in values.items():
                if name not in ("epoch", "step"):
                    self._events.add_scalar(f"epoch/{name}", value, values["step"])

    def _write(self, name: str, row: Row) -> None:
        if name not in self._writers:
            path = self._directory / name
            new = not path.exists()
            # Line-buffered, so that a kill leaves at most one incomplete line.
            file = self._files.enter_context(
                path.open("a", buffering=1, encoding="utf-8", newline="")
            )
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            self._writers[name] = file, writer
            if new:
                writer.writeheader()
        self._writers[name][1].writerow(row)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file, without an incomplete last line; none if the file is missing.

    Raises OSError if it cannot be read.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return list(csv.DictReader(line for line in lines if line.endswith("\n")))


def _tidy(path: Path, column: str, last: int) -> None:
    """Remove an incomplete last line, and rows with a ``column`` greater than ``last``."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    rows = [row for row in read_rows(path) if int(row[column]) <= last]
    kept = "".join(text.splitlines(keepends=True)[: len(rows) + 1]) if rows else ""
    if not kept:
        path.unlink()
    elif kept != text:
        write_atomically(path, kept.encode())
