"""Training: the schedule, resuming bit for bit, and fused against eager attention."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fused_attn.seq2seq import g2p_run
from fused_attn.seq2seq.batching import Examples
from fused_attn.seq2seq.config import ModelConfig, TrainingConfig
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.g2p_run import Recipe, TaskConfig
from fused_attn.seq2seq.model import Seq2Seq
from fused_attn.seq2seq.progress import LineProgress
from fused_attn.seq2seq.training import StepReport, Trainer, learning_rate, planned_steps

SIZE = 30  # of both vocabularies
SMALL = ModelConfig(hidden=16, embedding=8, dropout=0.3)


def make_examples() -> Examples:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(2, 9, (300,), generator=generator).tolist()
    sources = [torch.randint(3, SIZE, (n,), generator=generator).tolist() for n in lengths]
    return Examples(sources, [[token for token in s if token % 4] or [3] for s in sources])


def make_trainer(model: ModelConfig, recipe: TrainingConfig) -> Trainer:
    torch.manual_seed(recipe.seed)
    return Trainer(Seq2Seq(model, SIZE, SIZE), make_examples(), recipe)


def train(trainer: Trainer, stop_at: int | None = None) -> list[StepReport]:
    """Train to the end, or to a step."""
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


def test_the_plan() -> None:
    assert planned_steps(7, TrainingConfig(epochs=3)) == 21
    assert planned_steps(7, TrainingConfig(epochs=3, max_steps=10)) == 10
    assert planned_steps(7, TrainingConfig(epochs=1, max_steps=10)) == 7
    trainer = make_trainer(SMALL, TrainingConfig(epochs=9, batch_size=32, max_steps=13))
    assert [report.step for report in train(trainer)] == list(range(1, 14))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("stop_at", [0, 4, 10, 14])  # 10 steps an epoch
def test_resuming_repeats_the_uninterrupted_run_bit_for_bit(cell: str, stop_at: int) -> None:
    model = ModelConfig(cell=cell, hidden=16, embedding=8, layers=2, dropout=0.3)
    recipe = TrainingConfig(epochs=2, batch_size=32)
    whole = make_trainer(model, recipe)
    assert whole.batches_per_epoch == 10
    expected = train(whole)

    first = make_trainer(model, recipe)
    reports = train(first, stop_at)
    position, tensors = first.state()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    parameters = {name: tensor.clone() for name, tensor in first.model.state_dict().items()}

    second = make_trainer(model, TrainingConfig(epochs=2, batch_size=32))
    second.model.load_state_dict(parameters)
    torch.manual_seed(99)  # what another process would have
    second.load_state(position, tensors)
    assert reports + train(second) == expected
    assert_equal(second.model.state_dict(), whole.model.state_dict())
    assert_equal(second.state()[1], whole.state()[1])


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
    """200 steps of the demo's model on the dictionary, with both backends and the same seed."""
    training = TrainingConfig(epochs=4, batch_size=16, lr=3e-3)
    recipe = Recipe(ModelConfig(hidden=128), training, TaskConfig(limit_words=20_000))
    curves = []
    for backend in ("auto", "eager"):
        run = g2p_run.start(tmp_path / backend, recipe, LineProgress(io.StringIO()), backend)
        losses = [report.loss for report in train(run.trainer, stop_at=200)]
        curves.append(torch.tensor(losses))
    fused, eager = curves
    assert len(fused) == 200
    assert fused[-20:].mean() < 0.6 * fused[:20].mean()
    torch.testing.assert_close(fused, eager, rtol=0, atol=1e-3)
