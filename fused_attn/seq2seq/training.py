"""The training loop, which can stop after any step and go on to the same numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from fused_attn.seq2seq.batching import Batch, Examples, epoch_batches
from fused_attn.seq2seq.config import TrainingConfig
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.model import Seq2Seq
from fused_attn.seq2seq.sampling import sampling_probability

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
_GENERATOR = "generator"


@dataclass
class Position:
    """How far a training has come."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # epochs finished
    batch: int = 0  # batches done of the epoch after those
    loss: float = 0.0  # summed over the tokens of those batches
    tokens: int = 0  # of those batches
    sampling_from: int | None = None  # the step at which scheduled sampling began


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did."""

    step: int
    epoch: int
    loss: float  # mean over the tokens of the batch, in nats
    lr: float
    tokens: int
    sampling: float  # probability of the decoder's own symbols


def planned_steps(batches_per_epoch: int, config: TrainingConfig) -> int:
    """Return the number of steps of a whole run."""
    steps = batches_per_epoch * config.epochs
    return steps if config.max_steps is None else min(steps, config.max_steps)


def learning_rate(step: int, total: int, config: TrainingConfig) -> float:
    """Return the rate of step ``step`` of 0..total-1: a linear rise to lr, then a linear fall.

    The last step still learns: the fall would reach 0 one step after it.
    """
    warmup = max(1, math.ceil(config.warmup * total))
    rise = (step + 1) / warmup
    fall = (total - step) / max(1, total - warmup + 1)
    return config.lr * min(1.0, rise, fall)


class Trainer:
    """Adam on a `Seq2Seq` model, over the batches of `epoch_batches`.

    The order of the batches depends on seed and epoch alone and dropout on torch's generator, whose
    state is saved: a trainer that loads what another saved repeats, bit for bit, what that one
    would have done next, on the same machine with the same number of threads.
    """

    def __init__(self, model: Seq2Seq, examples: Examples, config: TrainingConfig) -> None:
        self.model = model
        self.examples = examples
        self.config = config
        begins = config.sampling != "none" and config.sampling_after is None
        self.position = Position(sampling_from=0 if begins else None)
        self.parameters = dict(model.named_parameters())
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=config.lr, fused=True)
        self._batches = self._epoch_batches()
        self.batches_per_epoch = len(self._batches)
        self.total_steps = planned_steps(self.batches_per_epoch, config)

    @property
    def finished(self) -> bool:
        """Whether all planned steps are done."""
        return self.position.step >= self.total_steps

    @property
    def at_epoch_end(self) -> bool:
        """Whether `finish_epoch` is due."""
        return self.position.batch == self.batches_per_epoch or self.finished

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
            on_step(self._step(self.examples.batch(self._batches[self.position.batch])))
        return True

    def _step(self, batch: Batch) -> StepReport:
        position = self.position
        lr = learning_rate(position.step, self.total_steps, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        sampling = self._sampling()
        loss = self.model.loss(
            batch.source,
            batch.source_lengths,
            batch.target,
            sampling=sampling,
            label_smoothing=self.config.label_smoothing,
            coverage_weight=self.config.coverage_loss,
        )
        loss.backward()
        norm = clip_grad_norm_(self.parameters.values(), self.config.clip)
        value = loss.item()
        if not (math.isfinite(value) and math.isfinite(norm.item())):
            raise InputError(
                f"the loss is {value} and the gradient's norm {norm.item()} at step "
                f"{position.step + 1}: train with a lower --lr"
            )
        self.optimizer.step()
        position.step += 1
        position.batch += 1
        position.loss += value * batch.tokens
        position.tokens += batch.tokens
        return StepReport(position.step, position.epoch + 1, value, lr, batch.tokens, sampling)

    def _sampling(self) -> float:
        start = self.position.sampling_from
        if start is None:
            return 0.0
        config = self.config
        progress = (self.position.step - start) / max(1, self.total_steps - start - 1)
        return sampling_probability(config.sampling, progress, config.sampling_max)

    def finish_epoch(self, rate: float | None = None) -> None:
        """Go on to the next epoch.

        rate: the first rate on the development set. Scheduled sampling begins once it is low
        enough: until then the model learns from right symbols only.
        """
        config, start = self.config, self.position.sampling_from
        step, epoch = self.position.step, self.position.epoch + 1
        if config.sampling != "none" and start is None and rate is not None:
            assert config.sampling_after is not None
            start = step if rate <= config.sampling_after else None
        self.position = Position(step=step, epoch=epoch, sampling_from=start)
        self._batches = self._epoch_batches()

    def _epoch_batches(self) -> list[Tensor]:
        config = self.config
        return epoch_batches(self.examples, config.batch_size, config.seed, self.position.epoch)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the position as JSON values, and optimizer and generator as tensors."""
        tensors = {_GENERATOR: torch.get_rng_state()}
        for name, parameter in self.parameters.items():
            for moment, tensor in self.optimizer.state[parameter].items():
                tensors[f"{moment}.{name}"] = tensor
        return asdict(self.position), tensors

    def load_state(self, position: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned. Raises KeyError, TypeError or ValueError if it does
        not fit; the parameters of the model are loaded by its owner.
        """
        restored = Position(**position)
        for name, parameter in self.parameters.items() if restored.step else ():
            moments = {moment: tensors[f"{moment}.{name}"] for moment in _MOMENTS}
            if moments["exp_avg"].shape != parameter.shape:
                raise ValueError(f"exp_avg.{name} does not have the shape of its parameter")
            self.optimizer.state[parameter] = moments
        self.position = restored
        self._batches = self._epoch_batches()
        torch.set_rng_state(tensors[_GENERATOR])
