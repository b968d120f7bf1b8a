"""The training loop. It can stop after any step and resume with the same results, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from fused_attn.seq2seq.config import TrainingConfig
from fused_attn.seq2seq.data.examples import Batch, Examples, epoch_batches, split_batch
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.training import stored
from fused_attn.seq2seq.training.processes import generator_state, launch, restore_generator, total
from fused_attn.seq2seq.training.schedules import learning_rate, planned_steps, sampling_probability

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
_GENERATOR = "generator"


@dataclass
class Position:
    """How far training has progressed; part of every checkpoint."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # epochs finished
    batch: int = 0  # batches done in the current epoch
    loss: float = 0.0  # summed over the target symbols of those batches, in nats
    tokens: int = 0  # target symbols of those batches
    sampling_from: int | None = None  # the step at which scheduled sampling started
    best: float | None = None  # best value so far of the first development metric, as a cost
    waited: int = 0  # epochs since the best value
    plateaus: int = 0  # all epochs that did not improve on the best value
    # Steps done beyond the finished epochs' batches, if a resumed run has changed its batches.
    extra: int = 0


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did."""

    step: int
    epoch: int
    loss: float  # mean over the target symbols of the batch, in nats
    lr: float
    tokens: int  # target symbols of the batch
    sampling: float  # probability of scheduled sampling


class Trainer:
    """Trains a `Seq2Seq` model with Adam on the batches of `epoch_batches`.

    The order of the batches depends only on the seed and the epoch, and dropout on torch's
    generator, whose state is saved. A trainer that loads a saved state therefore continues exactly
    as the saved one would have, bit for bit, on the same machine with the same numbers of threads
    and processes.

    Each process handles its share of every batch, in ``config.accumulate`` parts (gradient
    accumulation). The loss is divided by the number of target symbols of the whole batch, so
    neither changes the result, except for rounding.

    fabric: of this process, launched; None for a single process on the device of the model.

    Raises `InputError` if ``fabric`` is None and the device does not support the precision.
    """

    def __init__(
        self,
        model: Seq2Seq,
        examples: Examples,
        config: TrainingConfig,
        fabric: Fabric | None = None,
    ) -> None:
        device = str(next(model.parameters()).device)
        self.fabric = fabric = fabric or launch(device, config.precision)
        self.model = model
        self.examples = examples
        self.config = config
        samples_from_start = config.sampling != "none" and config.sampling_after is None
        self.position = Position(sampling_from=0 if samples_from_start else None)
        # With float16 the gradient must be unscaled and clipped before the update, which a fused
        # optimizer does not allow.
        fused = config.precision != "16"
        wrapped: Any = fabric.setup_module(model)
        wrapped.mark_forward_method("loss")
        self._wrapped = wrapped
        self.parameters = dict(model.named_parameters())
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=config.lr, fused=fused)
        self._stepper: Any = fabric.setup_optimizers(self.optimizer)
        self._batches = self._epoch_batches()
        self.batches_per_epoch = len(self._batches)

    def __repr__(self) -> str:
        position = self.position
        return (
            f"Trainer(step {position.step} of {self.total_steps}, epoch {position.epoch} of "
            f"{self.config.epochs}, {len(self.examples):,} pairs, on {self.fabric.device})"
        )

    @property
    def total_steps(self) -> int:
        """Number of steps of the whole run."""
        return planned_steps(self.batches_per_epoch, self.config, self.position.extra)

    @property
    def finished(self) -> bool:
        """Whether all planned steps are done, or early stopping applies.

        A run that was stopped after its last step, before `finish_epoch`, is not finished.
        """
        done = self.position.step >= self.total_steps and not self.position.batch
        return self.stopped_early or done

    @property
    def ended_by(self) -> tuple[str, ...]:
        """The options that would have to be larger for a finished run to continue."""
        if self.stopped_early:
            return ("patience",)
        most, config = self.config.max_steps, replace(self.config, max_steps=None)
        by_epochs = planned_steps(self.batches_per_epoch, config, self.position.extra)
        if most is None or most > by_epochs:
            return ("epochs",)
        return ("max_steps",) if most < by_epochs else ("epochs", "max_steps")

    @property
    def stopped_early(self) -> bool:
        """Whether ``config.patience`` epochs have passed without a new best development metric."""
        return self.config.patience is not None and self.position.waited >= self.config.patience

    @property
    def at_epoch_end(self) -> bool:
        """Whether the epoch or the run is at its end, so that `finish_epoch` is due."""
        done = self.position.step >= self.total_steps
        return self.position.batch == self.batches_per_epoch or done

    def run_epoch(
        self, on_step: Callable[[StepReport], None], should_stop: Callable[[], bool]
    ) -> bool:
        """Train to the end of the epoch, or of the run, or until ``should_stop()``.

        Returns whether the end was reached; `finish_epoch` is due then. Raises `InputError` if the
        loss is no longer finite.
        """
        self.model.train()
        while not self.at_epoch_end:
            if should_stop():
                return False
            on_step(self._step(self._batches[self.position.batch]))
        return True

    def _step(self, rows: Tensor) -> StepReport:
        position, config = self.position, self.config
        lr = learning_rate(position.step, self.total_steps, config, position.plateaus)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        sampling = self._sampling()
        tokens = int(self.examples.target_lengths[rows].sum()) - len(rows)
        loss = total(self.fabric, self._gradient(rows, tokens, sampling))
        norm = self.fabric.clip_gradients(
            self._wrapped, self._stepper, max_norm=config.clip, error_if_nonfinite=False
        )
        assert norm is not None
        # The only point in a step where the host waits for the device.
        value, size = torch.stack((loss, norm.to(loss.dtype))).tolist()
        # With float16 a gradient may overflow now and then; the scaler then lowers its scale.
        if not (math.isfinite(value) and (config.precision == "16" or math.isfinite(size))):
            raise InputError(
                f"the loss is {value} and the gradient norm {size} at step "
                f"{position.step + 1}: train with a lower --lr"
            )
        self._stepper.step()
        position.step += 1
        position.batch += 1
        position.loss += value * tokens
        position.tokens += tokens
        return StepReport(position.step, position.epoch + 1, value, lr, tokens, sampling)

    def _gradient(self, rows: Tensor, tokens: int, sampling: float) -> Tensor:
        """Accumulate the gradient of this process's share of a batch, and return its loss."""
        config, fabric = self.config, self.fabric
        summed = torch.zeros((), device=fabric.device)
        for last, share, batch in self._parts(rows):
            with fabric.no_backward_sync(self._wrapped, enabled=not last):
                with fabric.autocast():
                    loss = self._wrapped.loss(
                        batch.source,
                        batch.source_lengths,
                        batch.target,
                        sampling=sampling,
                        sampling_per=config.sampling_per,
                        label_smoothing=config.label_smoothing,
                        coverage_weight=config.coverage_loss,
                        alignment=batch.alignment,
                        guided_weight=config.guided,
                        rdrop=config.rdrop,
                        soft_targets=batch.soft_targets,
                        teacher_weight=config.teacher_weight,
                        tokens=tokens,
                    )
                # DDP averages the gradients over the processes, but the shares must be summed.
                fabric.backward(loss * (share * fabric.world_size))
            summed += loss.detach() * share
        return summed

    def _parts(self, rows: Tensor) -> Iterator[tuple[bool, float, Batch]]:
        """Yield the parts of this process: whether it is the last, its weight, and its pairs."""
        fabric, count = self.fabric, self.config.accumulate
        parts = split_batch(rows, fabric.world_size * count)[
            fabric.global_rank :: fabric.world_size
        ]
        last = count if fabric.world_size > 1 else min(count, len(rows))
        for number, part in enumerate(parts, start=1):
            if len(part) == 0 and fabric.world_size == 1:
                continue
            # All processes must run the model equally often, so an empty part takes any pair, with
            # the weight 0.
            chosen, share = (part, 1.0) if len(part) else (rows[:1], 0.0)
            yield number == last, share, self.examples.batch(chosen).to(fabric.device)

    def _sampling(self) -> float:
        start = self.position.sampling_from
        if start is None:
            return 0.0
        config = self.config
        progress = (self.position.step - start) / max(1, self.total_steps - start - 1)
        return sampling_probability(config.sampling, progress, config.sampling_max)

    def finish_epoch(self, rate: float | None = None) -> None:
        """Finish an epoch and prepare the batches of the next one.

        rate: the first development metric, as a cost (lower is better). It decides about plateaus
        of the learning rate, early stopping, and the start of scheduled sampling: that starts when
        the rate is at most ``config.sampling_after``.
        """
        config, before = self.config, self.position
        start, best, waited = before.sampling_from, before.best, before.waited
        plateaus = before.plateaus
        if rate is not None:
            if config.sampling != "none" and start is None:
                assert config.sampling_after is not None
                start = before.step if rate <= config.sampling_after else None
            if best is None or rate < best:
                best, waited = rate, 0
            else:
                waited, plateaus = waited + 1, plateaus + 1
        self.position = Position(
            step=before.step,
            epoch=before.epoch + 1,
            sampling_from=start,
            best=best,
            waited=waited,
            plateaus=plateaus,
            # An epoch that ends early, at the last step, has fewer batches.
            extra=before.extra + min(0, before.batch - self.batches_per_epoch),
        )
        self._batches = self._epoch_batches()

    def _epoch_batches(self) -> list[Tensor]:
        return epoch_batches(self.examples, self.config, self.position.epoch)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the position as JSON values, and the optimizer, generator and scaler state as
        tensors.

        All processes must call it together.
        """
        tensors = {_GENERATOR: generator_state(self.fabric)}
        for name, parameter in self.parameters.items():
            for moment, tensor in self.optimizer.state[parameter].items():
                tensors[f"{moment}.{name}"] = tensor
        for name, value in self.fabric.strategy.precision.state_dict().items():
            tensors[f"scaler.{name}"] = torch.tensor(value)
        return asdict(self.position), tensors

    def load_state(
        self,
        position: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        config: TrainingConfig | None = None,
    ) -> None:
        """Restore what `state` returned; the caller loads the parameters of the model.

        config: what the state was saved with, if that may differ. The schedules are then those of
        a run with the present configuration, from the saved step on. If the batches differ, an
        epoch that was begun begins again.

        Raises KeyError, TypeError or ValueError that names what does not match the model.
        """
        before = self.config if config is None else config
        restored = Position(**position)
        stored.check_position(restored)
        if _batching(before) != _batching(self.config):
            restored.batch, restored.loss, restored.tokens = 0, 0.0, 0
            restored.extra = restored.step - restored.epoch * self.batches_per_epoch
        # Scheduled sampling that waits for no rate starts where that of a new run does, and so does
        # sampling that did not wait before, or was not asked for.
        if before.sampling_after is None or self.config.sampling_after is None:
            restored.sampling_from = self.position.sampling_from
        batches = epoch_batches(self.examples, self.config, restored.epoch)
        if restored.batch > len(batches):
            raise ValueError(f"batch must be at most {len(batches)}, got {restored.batch}")
        state = {}
        if restored.step:
            for number, (name, parameter) in enumerate(self.parameters.items()):
                state[number] = {moment: tensors[f"{moment}.{name}"] for moment in _MOMENTS}
                stored.check_moments(name, state[number], parameter)
        stored.check_generator(_GENERATOR, tensors[_GENERATOR])
        precision = self.fabric.strategy.precision
        names = precision.state_dict() if before.precision == self.config.precision else ()
        scaler = {name: stored.number(tensors, f"scaler.{name}") for name in names}
        if restored.step:
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        if scaler:
            precision.load_state_dict(scaler)
        self.position = restored
        self._batches = batches
        restore_generator(self.fabric, tensors[_GENERATOR], self.config.seed + restored.step)


def _batching(config: TrainingConfig) -> tuple[object, ...]:
    """The options that decide which pairs are in a batch.

    With guided alignment a third column is read, and pairs with bad links may be skipped.
    """
    if config.batch_tokens is not None:
        return config.batch_tokens, bool(config.guided)
    return config.batch_size, config.bucket, bool(config.guided)
