"""A run: the directory that a training writes, with its log and its checkpoints.

DIR/log.jsonl                           a line for each step and for each epoch
DIR/checkpoints/step-0000465            the beginning, or where the training was stopped
DIR/checkpoints/step-0000926-epoch-02   after an epoch, with its error rates
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fused_attn.seq2seq import checkpoint
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.progress import Progress
from fused_attn.seq2seq.training import StepReport, Trainer

CHECKPOINTS = "checkpoints"
LOG = "log.jsonl"
# Besides the best.
KEPT_CHECKPOINTS = 2

ShouldStop = Callable[[], bool]
# Rates of the model on the development set by name, lower is better, the first decides which
# checkpoint is the best and the next break ties; None if it was stopped.
Evaluate = Callable[[ShouldStop], dict[str, float] | None]


def checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoints of a run, the latest last."""
    # By step, and of one step the end of the epoch last: it follows a stop while being judged.
    return sorted((directory / CHECKPOINTS).glob("step-*"))


# Models that come with the package, each a checkpoint without the state of its training.
SHIPPED = Path(__file__).resolve().parent.parent / "models"


def find_checkpoint(model: Path) -> Path:
    """Return the checkpoint that ``model`` names.

    That is itself, or the best of a run, or its last, or a model of that name that comes with the
    package. Raises `InputError` if there is none.
    """
    if (model / checkpoint.METADATA).exists():
        return model
    found = checkpoints(model)
    shipped = SHIPPED / model
    if not model.exists() and (shipped / checkpoint.METADATA).exists():
        return shipped
    if not found:
        raise InputError(f"no checkpoint at {model}: {_what_is_there(model)}")
    return _best(found) or found[-1]


def last_checkpoint(directory: Path) -> Path:
    """Return the checkpoint of a run to resume from; raises `InputError` if there is none."""
    found = checkpoints(directory)
    if not found:
        raise InputError(f"nothing to resume in {directory}: {_what_is_there(directory)}")
    return found[-1]


def _what_is_there(path: Path) -> str:
    if not path.exists():
        return "there is no such directory"
    return "it holds no checkpoint" if path.is_dir() else "it is not a directory"


def _best(found: list[Path]) -> Path | None:
    """Return the checkpoint with the lowest rates, the first rate before the others."""
    rates: dict[Path, tuple[float, ...]] = {}
    for path in found:
        if dev := checkpoint.load_metadata(path).get("dev"):
            rates[path] = tuple(dev.values())
    return min(rates, key=lambda path: rates[path], default=None)


class Run:
    """A training with its directory.

    Args:
        directory: of the run.
        trainer: new, or with the state of the run's last checkpoint loaded.
        meta: JSON values for every checkpoint: configurations, vocabularies, task.
        evaluate: of the model in its present state, on the development set.
        progress: where to report.
    """

    def __init__(
        self,
        directory: Path,
        trainer: Trainer,
        meta: Mapping[str, Any],
        evaluate: Evaluate,
        progress: Progress,
    ) -> None:
        self.directory = directory
        self.trainer = trainer
        self.meta = meta
        self.evaluate = evaluate
        self.progress = progress

    def train(self, should_stop: ShouldStop) -> bool:
        """Train to the end of the plan, or save a checkpoint and return once ``should_stop()``.

        Returns whether the end was reached. Raises OSError if the directory cannot be written, and
        `InputError` if the training fails; the checkpoints of before are whole then.
        """
        self._tidy()
        trainer = self.trainer
        log_file = (self.directory / LOG).open("a", buffering=1, encoding="utf-8")  # line by line
        with log_file as log, self.progress as progress:

            def write(**values: object) -> None:
                log.write(json.dumps(values) + "\n")

            def on_step(report: StepReport) -> None:
                write(**asdict(report))
                progress.step(report)

            progress.start(trainer.position.step, trainer.total_steps)
            while not trainer.finished:
                started = time.monotonic()
                at_end = trainer.run_epoch(on_step, should_stop)
                dev = self.evaluate(should_stop) if at_end else None
                if dev is None:
                    self._save(None)
                    return False
                position = trainer.position
                loss = position.loss / position.tokens
                trainer.finish_epoch(next(iter(dev.values()), None))
                seconds = round(time.monotonic() - started, 1)
                epoch = trainer.position.epoch
                write(epoch=epoch, step=position.step, train_loss=loss, **dev, seconds=seconds)
                self._save(dev)
                progress.epoch(epoch, loss, dev, seconds)
        return True

    def start(self) -> None:
        """Write the first checkpoint, of the untrained model, so that any run can be resumed."""
        self._save(None)

    def _tidy(self) -> None:
        """Remove what a killed process left: unfinished checkpoints, log lines of lost steps."""
        checkpoint.remove_unfinished(self.directory / CHECKPOINTS)
        log = self.directory / LOG
        if not log.exists():
            return
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and self._is_done(line)]
        if kept != lines:
            checkpoint.write_atomically(log, "".join(kept).encode())

    def _is_done(self, line: str) -> bool:
        """Whether a line of the log is about what the checkpoint has behind it."""
        position = self.trainer.position
        logged = json.loads(line)
        if "train_loss" in logged:
            return bool(logged["epoch"] <= position.epoch)
        return bool(logged["step"] <= position.step)

    def _save(self, dev: Mapping[str, float] | None) -> None:
        """Write a checkpoint; with the rates ``dev`` it is the end of an epoch."""
        position, tensors = self.trainer.state()
        name = f"step-{position['step']:07}" + (f"-epoch-{position['epoch']:02}" if dev else "")
        directory = self.directory / CHECKPOINTS / name
        if directory.exists():  # stopped again before the first step: nothing has changed
            return
        meta = {**self.meta, "position": position, "dev": dev}
        checkpoint.save(directory, meta, self.trainer.model.state_dict(), tensors)
        self._prune()

    def _prune(self) -> None:
        found = checkpoints(self.directory)
        best = _best(found)
        for path in found[:-KEPT_CHECKPOINTS]:
            if path != best:
                checkpoint.remove(path)
