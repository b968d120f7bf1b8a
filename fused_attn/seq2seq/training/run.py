"""A run: training in a directory with logs and checkpoints; see `directory`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.checkpoints.find import (
    CHECKPOINTS,
    best_checkpoint,
    checkpoints,
    last_checkpoint,
)
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.metrics import cost
from fused_attn.seq2seq.training.directory import owned
from fused_attn.seq2seq.training.logs import RunLog
from fused_attn.seq2seq.training.processes import total
from fused_attn.seq2seq.training.progress import Progress
from fused_attn.seq2seq.training.signals import stop_signals
from fused_attn.seq2seq.training.trainer import StepReport, Trainer

# Number of the latest checkpoints to keep. The best one is always kept.
KEPT_CHECKPOINTS = 2

ShouldStop = Callable[[], bool]
# Returns the metrics of the model on the development set by name, or None if stopped. The first
# metric decides which checkpoint is the best; the next ones break ties.
Evaluate = Callable[[ShouldStop], dict[str, float] | None]


class Run:
    """A training run in a directory. Only the first of several processes writes to it.

    Args:
        directory: for logs and checkpoints.
        trainer: new, or with the state of the run's last checkpoint.
        meta: JSON values for every checkpoint: configurations, vocabularies and task.
        evaluate: evaluates the current model on the development set.
        progress: where to report.
        tensorboard: whether to write events for TensorBoard.
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
        """Train to the end of the run, or until ``should_stop()``; then save a checkpoint and stop.

        Returns whether the end was reached. Raises OSError if the directory cannot be written, and
        `InputError` if training fails; earlier checkpoints are intact then.
        """
        trainer = self.trainer
        if self._first:
            for place in (self.directory, self.directory / CHECKPOINTS):
                files.remove_unfinished(place)
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
            head = {"epoch": epoch, "step": position.step, "train_loss": loss}
            log.epoch({**head, **dev, "seconds": round(seconds, 1)})
        self._save(dev)
        self.progress.epoch(epoch, loss, dev, seconds)

    def start(self) -> None:
        """Write a checkpoint of the untrained model, so that the run can be resumed at any time."""
        self._save(None)

    def _save(self, dev: Mapping[str, float] | None) -> None:
        """Write a checkpoint. ``dev`` has the metrics at the end of an epoch, else it is None."""
        position, tensors = self.trainer.state()
        name = f"step-{position['step']:07}" + (f"-epoch-{position['epoch']:02}" if dev else "")
        directory = self.directory / CHECKPOINTS / name
        # Only after `state`, which gathers from all processes. The directory exists if the run was
        # resumed and stopped before its first step: nothing has changed then.
        if not self._first or directory.exists():
            return
        meta = {**self.meta, "position": position, "dev": dev}
        files.save(directory, meta, self.trainer.model.state_dict(), tensors)
        self._prune()

    def _prune(self) -> None:
        found = checkpoints(self.directory)
        try:
            best = best_checkpoint(found)
        except files.DamagedError:  # nothing is removed: the best may be the damaged one
            return
        for path in found[:-KEPT_CHECKPOINTS]:
            if path != best:
                files.remove(path)


@dataclass(frozen=True)
class Outcome:
    """The result of `carry_out`.

    stopped: whether a signal stopped the run. was_complete: whether no steps were left to train.
    """

    run: Run
    stopped: bool = False
    was_complete: bool = False


def carry_out(directory: Path, make_run: Callable[[], Run], *, resume: bool) -> Outcome:
    """Train a run to its end, or until SIGINT or SIGTERM, which write a checkpoint and stop it.

    directory: of the run. make_run: starts or resumes the run. resume: which of these it does.

    Raises `InputError` if the run cannot be started or written, or another process owns it.
    """
    if resume:
        last_checkpoint(directory)  # so that no directory is made if there is nothing to resume
    with stop_signals() as received:
        try:
            with owned(directory):
                run = make_run()
                if run.trainer.finished:
                    return Outcome(run, was_complete=True)
                fabric = run.trainer.fabric
                stopped = not run.train(lambda: _any(fabric, received()))
        except BrokenPipeError:
            raise
        except OSError as error:
            raise InputError(
                f"cannot write to {error.filename or directory}: {error.strerror}; "
                "earlier checkpoints are intact"
            ) from None
    if not stopped:
        fabric.barrier()  # until process 0 has written the last checkpoint
    return Outcome(run, stopped)


def _any(fabric: Fabric, value: bool) -> bool:
    """Whether ``value`` is true in any process: all must stop at the same step."""
    if fabric.world_size == 1:
        return value
    return total(fabric, torch.tensor(float(value), device=fabric.device)).item() > 0
