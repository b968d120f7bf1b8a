"""Show the progress of training: a bar on a terminal, lines of text elsewhere."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from fused_attn.seq2seq.metrics import shown

if TYPE_CHECKING:
    from rich.console import Console

    from fused_attn.seq2seq.training.trainer import StepReport

_SMOOTHING = 0.95  # exponential smoothing of the displayed loss and speed
_LINE_SECONDS = 15.0  # between two lines


class Progress(ABC):
    """Displays the steps and epochs of training; a context manager around them."""

    def __init__(self) -> None:
        self._loss: float | None = None
        self._speed: float | None = None
        self._total = 0
        self._first = 0
        self._started = self._last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None

    def start(self, done: int, total: int) -> None:
        """Begin at step ``done`` of ``total``."""
        self._first, self._total = done, total
        self._started = self._last = time.monotonic()

    def step(self, report: StepReport) -> None:
        """Show a step, with smoothed loss and speed."""
        now = time.monotonic()
        self._loss = _smooth(self._loss, report.loss)
        self._speed = _smooth(self._speed, report.tokens / max(now - self._last, 1e-9))
        self._last = now
        self.show(report, self._loss, self._speed)

    @abstractmethod
    def show(self, report: StepReport, loss: float, speed: float) -> None:
        """Display a step. ``loss`` (nats) and ``speed`` (target symbols a second) are smoothed."""

    @abstractmethod
    def line(self, text: str) -> None:
        """Print a permanent line."""

    def epoch(self, epoch: int, loss: float, dev: Mapping[str, float], seconds: float) -> None:
        """Print the result of an epoch: mean training loss in nats, development metrics, time."""
        measures = "  ".join(f"{name} {shown(name, value)}" for name, value in dev.items())
        self.line(f"epoch {epoch}: loss {loss:.4f}  dev {measures}  {seconds:.0f} s")


class NoProgress(Progress):
    """Shows nothing: for processes other than the first, or when progress is not wanted."""

    def show(self, report: StepReport, loss: float, speed: float) -> None:
        return None

    def line(self, text: str) -> None:
        return None


class LineProgress(Progress):
    """A line of text every 15 seconds."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._shown = time.monotonic()

    def show(self, report: StepReport, loss: float, speed: float) -> None:
        now = time.monotonic()
        if now - self._shown < _LINE_SECONDS:
            return
        self._shown = now
        left = (now - self._started) / (report.step - self._first) * (self._total - report.step)
        self.line(
            f"step {report.step}/{self._total}  epoch {report.epoch}  loss {loss:.4f}  "
            f"{speed:,.0f} tokens/s  {_clock(left)} left"
        )

    def line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class BarProgress(Progress):
    """A bar on the last line of a terminal."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        from rich import progress

        self._bar = progress.Progress(
            progress.TextColumn("epoch {task.fields[epoch]}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("loss {task.fields[loss]:.4f}"),
            progress.TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("left"),
            console=console,
        )
        self._task = self._bar.add_task("train", epoch=1, loss=float("nan"), speed=0.0)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def start(self, done: int, total: int) -> None:
        super().start(done, total)
        self._bar.reset(self._task, total=total, completed=done)

    def show(self, report: StepReport, loss: float, speed: float) -> None:
        self._bar.update(
            self._task, completed=report.step, epoch=report.epoch, loss=loss, speed=speed
        )

    def line(self, text: str) -> None:
        self._bar.console.print(text, highlight=False)


def make_progress(stream: TextIO | None = None) -> Progress:
    """Return a bar if ``stream`` is a terminal, else lines; None means standard error."""
    stream = stream or sys.stderr
    if stream is None:  # it is closed
        return NoProgress()
    if not stream.isatty():
        return LineProgress(stream)
    from rich.console import Console

    return BarProgress(Console(file=stream))


def _smooth(before: float | None, value: float) -> float:
    return value if before is None else _SMOOTHING * before + (1 - _SMOOTHING) * value


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02}"
