"""Training: the schedule, resuming bit for bit, and fused against eager attention."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fused_attn.seq2seq.checkpoints.recipe import Recipe
from fused_attn.seq2seq.config import LR_SCHEDULES, SCHEDULES, ModelConfig, TrainingConfig
from fused_attn.seq2seq.data.examples import Examples
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.tasks.g2p import G2P, G2PConfig
from fused_attn.seq2seq.training import start
from fused_attn.seq2seq.training.processes import launch
from fused_attn.seq2seq.training.progress import LineProgress
from fused_attn.seq2seq.training.schedules import (
    learning_rate,
    planned_steps,
    sampling_probability,
)
from fused_attn.seq2seq.training.start import Machine
from fused_attn.seq2seq.training.trainer import StepReport, Trainer
from fused_attn.seq2seq.vocabulary import PAD

SIZE = 30  # of both vocabularies
SMALL = ModelConfig(hidden=16, embedding=8, dropout=0.3)


def make_examples() -> Examples:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(2, 9, (300,), generator=generator).tolist()
    sources = [torch.randint(3, SIZE, (n,), generator=generator).tolist() for n in lengths]
    return Examples.of(sources, [[token for token in s if token % 4] or [3] for s in sources])


def make_trainer(model: ModelConfig, recipe: TrainingConfig) -> Trainer:
    torch.manual_seed(recipe.seed)
    return Trainer(Seq2Seq(model, SIZE, SIZE), make_examples(), recipe)


def train(trainer: Trainer, stop_at: int | None = None) -> list[StepReport]:
    """Train to the end, or to the step ``stop_at``."""
    reports: list[StepReport] = []
    while not trainer.finished:
        if not trainer.run_epoch(reports.append, lambda: trainer.position.step == stop_at):
            break
        trainer.finish_epoch()
    return reports


def test_the_rate_rises_and_falls_to_nothing_over_the_plan() -> None:
    config = TrainingConfig(lr=0.5, warmup=0.1)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[:3] == pytest.approx([0.05, 0.1, 0.15])
    assert max(rates) == rates[9] == 0.5
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 0.5 / 90 + 1e-9
    assert learning_rate(0, 1, TrainingConfig(lr=0.5)) == 0.5


def test_the_schedules_of_the_rate() -> None:
    def rates(schedule: str, plateaus: int = 0) -> list[float]:
        config = TrainingConfig(lr=0.8, warmup=0.1, lr_schedule=schedule)
        return [learning_rate(step, 100, config, plateaus) for step in range(100)]

    found = {name: rates(name) for name in LR_SCHEDULES}
    for name, values in found.items():
        assert values[:10] == pytest.approx([0.08 * n for n in range(1, 11)]), name
        assert values[9:] == sorted(values[9:], reverse=True) and values[-1] > 0
    assert found["constant"][10:] == found["plateau"][10:] == [0.8] * 90
    assert rates("plateau", 3)[10:] == [0.1] * 90
    assert found["inverse-sqrt"][39] == pytest.approx(0.4)  # of step 40, four times the warm-up
    # 0.8 (1 + cos(pi x)) / 2, x from 0 at the tenth step to 1 at one after the last
    cosine = [0.4 * (1 + math.cos(math.pi * (step - 9) / 91)) for step in range(10, 100)]
    assert found["cosine"][10:] == pytest.approx(cosine)


def test_patience_and_plateaus() -> None:
    """Three epochs without improvement stop training; each halves the "plateau" learning rate."""
    options = {"lr_schedule": "plateau", "patience": 3, "warmup": 0.0, "lr": 1e-3}
    trainer = make_trainer(SMALL, TrainingConfig(epochs=50, batch_size=150, **options))
    reports: list[StepReport] = []
    for rate in (0.5, 0.6, 0.4, 0.4, 0.5, 0.4):
        assert not trainer.finished
        assert trainer.run_epoch(reports.append, lambda: False)
        trainer.finish_epoch(rate)
    assert trainer.finished
    assert [report.lr for report in reports[::2]] == [1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4, 1.25e-4]
    again = make_trainer(SMALL, trainer.config)
    again.load_state(*trainer.state())
    assert again.finished and again.position.best == 0.4


def test_the_plan() -> None:
    assert planned_steps(7, TrainingConfig(epochs=3)) == 21
    assert planned_steps(7, TrainingConfig(epochs=3, max_steps=10)) == 10
    assert planned_steps(7, TrainingConfig(epochs=1, max_steps=10)) == 7
    trainer = make_trainer(SMALL, TrainingConfig(epochs=9, batch_size=32, max_steps=13))
    assert [report.step for report in train(trainer)] == list(range(1, 14))


RESUMED = {
    "lstm": ({"cell": "lstm", "layers": 2}, {}),
    "gru": ({"cell": "gru", "layers": 2, "tie": "output"}, {"label_smoothing": 0.1}),
    "sampled": (
        {"input_feeding": True, "variational": True, "bidirectional": False},
        {"sampling": "linear", "sampling_max": 0.5},
    ),
    "covered": ({"score": "concat", "coverage": True}, {"coverage_loss": 0.5}),
}


@pytest.mark.parametrize("kind", RESUMED)
@pytest.mark.parametrize("stop_at", [0, 4, 10, 14])  # 10 steps per epoch
def test_resuming_repeats_the_uninterrupted_run_bit_for_bit(kind: str, stop_at: int) -> None:
    shape, options = RESUMED[kind]
    model = ModelConfig(hidden=16, embedding=8, dropout=0.3, **shape)
    recipe = TrainingConfig(epochs=2, batch_size=32, **options)
    whole = make_trainer(model, recipe)
    assert whole.batches_per_epoch == 10
    expected = train(whole)

    first = make_trainer(model, recipe)
    reports = train(first, stop_at)
    position, tensors = first.state()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    parameters = {name: tensor.clone() for name, tensor in first.model.state_dict().items()}

    second = make_trainer(model, recipe)
    second.model.load_state_dict(parameters)
    torch.manual_seed(99)  # as in another process
    second.load_state(position, tensors)
    assert reports + train(second) == expected
    assert_equal(second.model.state_dict(), whole.model.state_dict())
    assert_equal(second.state()[1], whole.state()[1])


def test_sampling_schedules() -> None:
    """All except "none" rise to the largest probability, as their names say."""
    at = [0.0, 0.25, 0.5, 0.75, 1.0]
    found = {
        name: [sampling_probability(name, progress, 0.4) for progress in at] for name in SCHEDULES
    }
    assert found["none"] == [0.0] * 5 and found["constant"] == [0.4] * 5
    assert found["linear"] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    # 1 - 0.01^x, and the sigmoid of 12 (x - 1/2) between its ends
    exponential = [0.4 * (1 - 0.01**x) / 0.99 for x in at]
    assert found["exponential"] == pytest.approx(exponential)
    ends = [1 / (1 + math.exp(6)), 1 / (1 + math.exp(-6))]
    sigmoid = [0.4 * (1 / (1 + math.exp(6 - 12 * x)) - ends[0]) / (ends[1] - ends[0]) for x in at]
    assert found["inverse-sigmoid"] == pytest.approx(sigmoid)
    for name in ("linear", "exponential", "inverse-sigmoid"):
        assert found[name] == sorted(found[name]) and found[name][-1] == pytest.approx(0.4)
    assert sampling_probability("linear", 7.0, 0.4) == 0.4
    with pytest.raises(ValueError, match="unknown schedule 'often'"):
        sampling_probability("often", 0.5, 0.4)


def test_sampling_begins_once_the_model_is_good_enough() -> None:
    """Teacher forcing until the error is low enough, then the schedule over the steps left."""
    options = {"sampling": "linear", "sampling_max": 0.6, "sampling_after": 0.5}
    trainer = make_trainer(SMALL, TrainingConfig(epochs=4, batch_size=32, **options))
    reports: list[StepReport] = []
    for rate in (0.9, 0.5, 0.7, 0.1):  # once started, a worse rate does not stop it
        assert trainer.run_epoch(reports.append, lambda: False)
        trainer.finish_epoch(rate)
    found = [report.sampling for report in reports]
    assert found[:20] == [0.0] * 20
    assert found[20:] == pytest.approx([0.6 * i / 19 for i in range(20)])


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []


def test_a_state_that_does_not_fit_is_refused() -> None:
    recipe = TrainingConfig(epochs=1, batch_size=64, max_steps=2)
    trainer = make_trainer(SMALL, recipe)
    train(trainer)
    position, tensors = trainer.state()
    wider = make_trainer(ModelConfig(hidden=24, embedding=8), recipe)
    with pytest.raises(ValueError, match="shape"):
        wider.load_state(position, tensors)
    with pytest.raises(KeyError):
        trainer.load_state(position, {})


def test_a_loss_that_is_not_finite_ends_the_training_before_it_spoils_the_model() -> None:
    trainer = make_trainer(SMALL, TrainingConfig(epochs=1, batch_size=64))
    with torch.no_grad():
        trainer.model.output.bias[5] = float("nan")
    before = trainer.model.source_embedding.weight.clone()
    with pytest.raises(InputError, match=r"nan.*lower --lr"):
        train(trainer)
    assert torch.equal(trainer.model.source_embedding.weight, before)


def test_fused_and_eager_attention_give_the_same_loss_curve(tmp_path: Path) -> None:
    """200 steps of the g2p model on the dictionary, with both backends and the same seed."""
    training = TrainingConfig(epochs=4, batch_size=16, lr=3e-3)
    recipe = Recipe(ModelConfig(hidden=128), training, G2P(G2PConfig(limit_words=20_000)))
    curves = []
    for backend in ("auto", "eager"):
        machine = Machine(launch("cpu"), backend)
        run = start.start_run(tmp_path / backend, recipe, LineProgress(io.StringIO()), machine)
        losses = [report.loss for report in train(run.trainer, stop_at=200)]
        curves.append(torch.tensor(losses))
    fused, eager = curves
    assert len(fused) == 200
    assert fused[-20:].mean() < 0.6 * fused[:20].mean()
    torch.testing.assert_close(fused, eager, rtol=0, atol=1e-3)


def walks(count: int, seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Targets in which every symbol depends on the one before it and on the source.

    a <- (3 a + x) mod 10, twice per source symbol x. A wrong symbol makes all later ones wrong.
    """
    generator = torch.Generator().manual_seed(seed)
    sources, targets = [], []
    for _ in range(count):
        length = int(torch.randint(3, 7, (1,), generator=generator))
        source = torch.randint(3, 13, (length,), generator=generator).tolist()
        state, target = source[0] - 3, []
        for x in source:
            for _ in range(2):
                state = (3 * state + x) % 10
                target.append(state + 3)
        sources.append(source)
        targets.append(target)
    return sources, targets


def accuracies(model: Seq2Seq, examples: Examples) -> tuple[float, float]:
    """Symbol accuracies with teacher forcing, and with the model's own symbols as input."""
    batch = examples.batch(torch.arange(len(examples)))
    inputs, expected = batch.target[:, :-1], batch.target[:, 1:]
    counts, found = expected != PAD, []
    with torch.no_grad():
        for sampling in (0.0, 1.0):
            logits, _ = model(batch.source, batch.source_lengths, inputs, sampling=sampling)
            right = (logits.argmax(dim=-1) == expected) & counts
            found.append(float(right.sum() / counts.sum()))
    return found[0], found[1]


def test_scheduled_sampling_shrinks_exposure_bias() -> None:
    """The accuracy lost when the input is the model's own symbols, with and without sampling."""
    gaps: dict[str, list[float]] = {"none": [], "linear": []}
    free: dict[str, list[float]] = {"none": [], "linear": []}
    fresh = Examples.of(*walks(500, seed=2))
    for seed in range(2):
        for sampling in gaps:
            torch.manual_seed(seed)
            shape = ModelConfig(cell="gru", hidden=48, embedding=16, dropout=0.1)
            options = {"sampling": sampling, "sampling_max": 0.7, "seed": seed}
            recipe = TrainingConfig(epochs=10, batch_size=64, lr=5e-3, **options)
            trainer = Trainer(Seq2Seq(shape, 13, 13), Examples.of(*walks(1500, seed=1)), recipe)
            train(trainer)
            right, own = accuracies(trainer.model.eval(), fresh)
            gaps[sampling].append(right - own)
            free[sampling].append(own)
    assert min(gaps["none"]) > 0.02  # exposure bias is visible here
    assert sum(gaps["linear"]) < 0.6 * sum(gaps["none"])
    assert sum(free["linear"]) > sum(free["none"]) - 0.01  # and accuracy does not suffer
