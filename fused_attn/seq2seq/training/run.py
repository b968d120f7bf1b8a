"""A run: the directory that a training writes, with its log and its checkpoints.

DIR/steps.csv, DIR/epochs.csv           its log, see `logs`
DIR/teacher.safetensors                 what the teachers of a training with --teacher say
DIR/pairs/                              the encoded pairs of a training from the disk
DIR/checkpoints/step-0000465            the beginning, or where the training was stopped
DIR/checkpoints/step-0000926-epoch-02   after an epoch, with its error rates
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.checkpoints.find import CHECKPOINTS, best_checkpoint, checkpoints
from fused_attn.seq2seq.metrics import cost
from fused_attn.seq2seq.training.logs import RunLog
from fused_attn.seq2seq.training.progress import Progress

if TYPE_CHECKING:  # prediction needs nothing of training
    from fused_attn.seq2seq.training.trainer import StepReport, Trainer

PAIRS = "pairs"
# Besides the best.
KEPT_CHECKPOINTS = 2

ShouldStop = Callable[[], bool]
# Measures of the model on the development set by name; the first decides which checkpoint is the
# best and the next break ties; None if it was stopped.
Evaluate = Callable[[ShouldStop], dict[str, float] | None]


class Run:
    """A training with its directory.

    Args:
        directory: of the run.
        trainer: new, or with the state of the run's last checkpoint loaded.
        meta: JSON values for every checkpoint: configurations, vocabularies, task.
        evaluate: of the model in its present state, on the development set.
        progress: where to report.
        tensorboard: whether to write events for TensorBoard.

    Of several processes the first writes.
    """

    def __init__(
        self,
        directory: Path,
        trainer: Trainer,
        meta: Mapping[str, Any],
        evaluate: Evaluate,
        progress: Progress,
        tensorboard: bool = False,
    ) -> None:
        self.directory = directory
        self.trainer = trainer
        self.meta = meta
        self.evaluate = evaluate
        self.progress = progress
        self.tensorboard = tensorboard
        self._first = trainer.fabric.is_global_zero

    def train(self, should_stop: ShouldStop) -> bool:
        """Train to the end of the plan, or save a checkpoint and return once ``should_stop()``.

        Returns whether the end was reached. Raises OSError if the directory cannot be written, and
        `InputError` if the training fails; the checkpoints of before are whole then.
        """
        trainer = self.trainer
        if self._first:
            files.remove_unfinished(self.directory / CHECKPOINTS)
        with ExitStack() as stack:
            progress, log = stack.enter_context(self.progress), None
            if self._first:
                written = RunLog(self.directory, trainer.position, tensorboard=self.tensorboard)
                log = stack.enter_context(written)

            def on_step(report: StepReport) -> None:
                if log is not None:
                    log.step(report)
                progress.step(report)

            progress.start(trainer.position.step, trainer.total_steps)
            while not trainer.finished:
                started = time.monotonic()
                at_end = trainer.run_epoch(on_step, should_stop)
                dev = self.evaluate(should_stop) if at_end else None
                if dev is None:
                    self._save(None)
                    return False
                self._finish_epoch(dev, time.monotonic() - started, log)
        return True

    def _finish_epoch(self, dev: Mapping[str, float], seconds: float, log: RunLog | None) -> None:
        position = self.trainer.position
        loss = position.loss / position.tokens
        name, value = next(iter(dev.items()))
        self.trainer.finish_epoch(cost(name, value))
        epoch = self.trainer.position.epoch
        if log is not None:
            places = {"epoch": epoch, "step": position.step, "train_loss": loss}
            log.epoch({**places, **dev, "seconds": round(seconds, 1)})
        self._save(dev)
        self.progress.epoch(epoch, loss, dev, seconds)

    def start(self) -> None:
        """Write the first checkpoint, of the untrained model, so that any run can be resumed."""
        self._save(None)

    def _save(self, dev: Mapping[str, float] | None) -> None:
        """Write a checkpoint; with the rates ``dev`` it is the end of an epoch."""
        position, tensors = self.trainer.state()
        name = f"step-{position['step']:07}" + (f"-epoch-{position['epoch']:02}" if dev else "")
        directory = self.directory / CHECKPOINTS / name
        # Every process has to take part in what comes before.
        if (
            not self._first or directory.exists()
        ):  # stopped again before the first step: nothing has changed
            return
        meta = {**self.meta, "position": position, "dev": dev}
        files.save(directory, meta, self.trainer.model.state_dict(), tensors)
        self._prune()

    def _prune(self) -> None:
        found = checkpoints(self.directory)
        best = best_checkpoint(found)
        for path in found[:-KEPT_CHECKPOINTS]:
            if path != best:
                files.remove(path)
