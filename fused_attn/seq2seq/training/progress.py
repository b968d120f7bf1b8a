"""Showing how a training goes: a bar on a terminal, lines anywhere else."""

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

_SMOOTHING = 0.95  # of the loss and the speed shown
_LINE_SECONDS = 15.0


class Progress(ABC):
    """Follows the steps of a training; a context manager around them."""

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
        """Count a step."""
        now = time.monotonic()
        self._loss = _smooth(self._loss, report.loss)
        self._speed = _smooth(self._speed, report.tokens / max(now - self._last, 1e-9))
        self._last = now
        self.show(report, self._loss, self._speed)

    @abstractmethod
    def show(self, report: StepReport, loss: float, speed: float) -> None:
        """Show a step; ``loss`` and ``speed`` (target symbols a second) are smoothed."""

    @abstractmethod
    def line(self, text: str) -> None:
        """Show a line that stays."""

    def epoch(self, epoch: int, loss: float, dev: Mapping[str, float], seconds: float) -> None:
        """Show the end of an epoch: its mean training loss, and measures on development data."""
        measures = "  ".join(f"{name} {shown(name, value)}" for name, value in dev.items())
        self.line(f"epoch {epoch}: loss {loss:.4f}  dev {measures}  {seconds:.0f} s")


class NoProgress(Progress):
    """Of a process that leaves it to another one."""

    def show(self, report: StepReport, loss: float, speed: float) -> None:
        return None

    def line(self, text: str) -> None:
        return None


class LineProgress(Progress):
    """A line of text now and then."""

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
    """A bar that stays on the last line of a terminal."""

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
    """Return the bar if ``stream`` (standard output) is a terminal, or else lines."""
    stream = stream or sys.stdout
    if not stream.isatty():
        return LineProgress(stream)
    from rich.console import Console

    return BarProgress(Console(file=stream))


def _smooth(before: float | None, value: float) -> float:
    return value if before is None else _SMOOTHING * before + (1 - _SMOOTHING) * value


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02}"
