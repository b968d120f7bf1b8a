"""The logs of a run: CSV files with its steps and epochs, and events for TensorBoard.

DIR/steps.csv    step, epoch, loss (nats per symbol), lr, tokens, sampling
DIR/epochs.csv   epoch, step, train_loss, metrics on the development set, seconds
DIR/tensorboard  the same numbers, if asked for
"""

from __future__ import annotations

import codecs
import csv
import errno
import io
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

from fused_attn.seq2seq.outputs import write_atomically

if TYPE_CHECKING:
    from fused_attn.seq2seq.training.trainer import Position, StepReport

STEPS, EPOCHS = "steps.csv", "epochs.csv"
TENSORBOARD = "tensorboard"
# The columns of a log if its first line is damaged. Those of EPOCHS depend on the task.
_COLUMNS = {STEPS: ["step", "epoch", "loss", "lr", "tokens", "sampling"]}
_COUNTS = ("step", "epoch", "tokens")  # columns of whole numbers; all others are real numbers

Row = Mapping[str, object]


class RunLog:
    """Writes the logs of a run; a context manager around its training.

    Args:
        directory: of the run. If a log in it is damaged, the rows that can be read are kept, and
            the file as it was is kept beside it as ``steps.csv.damaged``.
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
            columns = list(row)
            _fit(path, columns)
            new = not path.exists()
            # Line-buffered, so that a kill leaves at most one incomplete line.
            file = self._files.enter_context(
                path.open("a", buffering=1, encoding="utf-8", newline="")
            )
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            self._writers[name] = file, writer
            if new:
                writer.writeheader()
        self._writers[name][1].writerow(row)


@dataclass(frozen=True)
class Table:
    """What can be read of a log.

    columns: their names, none if they are not known.
    rows: the rows that can be read, each with all columns.
    unreadable: number of other lines, except an incomplete last one.
    """

    columns: list[str] = field(default_factory=list)
    rows: list[dict[str, str]] = field(default_factory=list)
    unreadable: int = 0

    def text(self, columns: Sequence[str]) -> str:
        """Return a log with the rows and these columns, some of `columns`."""
        written = io.StringIO()
        writer = csv.DictWriter(written, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return written.getvalue()


def read_table(path: Path) -> Table:
    """Read a log; a missing file is an empty one. Raises OSError if it cannot be read.

    A row can be read if it has as many values as the first line, and all are finite numbers.
    """
    if not path.exists():
        return Table()
    if not path.is_file():  # a FIFO would not end
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    # A kill may leave an incomplete last line, which is no damage.
    first, *lines = path.read_bytes().split(b"\n")[:-1] or [b""]
    if not first and not lines:
        return Table()
    columns, unreadable = _values(first.removeprefix(codecs.BOM_UTF8)), 0
    if len(set(columns)) < len(columns) or not {"epoch", "step"} <= set(columns):
        columns, unreadable = _COLUMNS.get(path.name, []), 1
    found = Table(columns)
    for line in lines:
        values = _values(line)
        if columns and len(values) == len(columns) and all(map(_is_number, columns, values)):
            found.rows.append(dict(zip(columns, values, strict=True)))
        else:
            unreadable += 1
    return replace(found, unreadable=unreadable)


def _values(line: bytes) -> list[str]:
    """The values of a line, none if it cannot be read."""
    try:
        return next(csv.reader([line.decode()], strict=True), [])
    except (UnicodeDecodeError, csv.Error):
        return []


def _is_number(column: str, value: str) -> bool:
    try:
        if column in _COUNTS:
            return 0 <= int(value) < 2**63
        return math.isfinite(float(value))
    except ValueError:
        return False


def _tidy(path: Path, column: str, last: int) -> None:
    """Remove an incomplete last line, rows that cannot be read, and rows after ``last``."""
    if not path.exists():
        return
    table = read_table(path)
    if table.unreadable:
        _set_aside(path, f"{table.unreadable} of its lines cannot be read")
    table.rows[:] = [row for row in table.rows if int(row[column]) <= last]
    kept = table.text(table.columns).encode()
    if not table.rows:
        path.unlink()
    elif kept != path.read_bytes():
        write_atomically(path, kept)


def _fit(path: Path, columns: list[str]) -> None:
    """Set a log aside that has other columns. Its rows are kept if they have these, too."""
    table = read_table(path)
    if table.columns in ([], columns):
        return
    _set_aside(path, "it has other columns than this version writes")
    if set(columns) <= set(table.columns):
        write_atomically(path, table.text(columns).encode())
    else:
        path.unlink()


def _set_aside(path: Path, why: str) -> None:
    """Copy a log to a new name beside it, and say so."""
    number = 1
    while True:
        copy = path.with_name(f"{path.name}.damaged" + (f"-{number}" if number > 1 else ""))
        try:
            with copy.open("xb") as file:
                file.write(path.read_bytes())
            break
        except FileExistsError:
            number += 1
    print(f"note: {path}: {why}; the file is kept as {copy.name}", file=sys.stderr)
