"""Distillation: the soft targets of teachers, and training with them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from fused_attn.cli import main
from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.checkpoints.find import checkpoints
from fused_attn.seq2seq.config import ModelConfig, TrainingConfig
from fused_attn.seq2seq.data.examples import Batch, Examples
from fused_attn.seq2seq.data.soft_targets import SoftTargets
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.training import distillation
from fused_attn.seq2seq.training.distillation import FILE, KEPT, soft_targets
from fused_attn.seq2seq.training.trainer import Trainer
from fused_attn.seq2seq.vocabulary import EOS, PAD

SYMBOLS = 17  # more than `KEPT`


def pairs(count: int, seed: int = 0, noise: float = 0.0) -> Examples:
    """Sources of 1 to 7 symbols, reversed as targets, with a share of random target symbols."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in torch.randint(1, 8, (count,), generator=generator).tolist():
        source = torch.randint(4, SYMBOLS, (length,), generator=generator)
        other = torch.randint(4, SYMBOLS, (length,), generator=generator)
        target = source.flip(0).where(torch.rand(length, generator=generator) >= noise, other)
        found.append((source.tolist(), target.tolist(), ()))
    return Examples.collect(found)


def small(seed: int = 1) -> Seq2Seq:
    torch.manual_seed(seed)
    model = Seq2Seq(ModelConfig(hidden=24, embedding=12, dropout=0.0), SYMBOLS, SYMBOLS)
    model.output.weight.data *= 20.0  # as confident as a trained model
    return model


def batch_of(examples: Examples) -> Batch:
    return examples.batch(torch.arange(len(examples)))


def mean_probabilities(models: list[Seq2Seq], source: Tensor, target: Tensor) -> Tensor:
    """Their mean probabilities for one pair, (T, V), in float64; 0 except for the most probable."""
    lengths = torch.tensor([len(source)])
    with torch.no_grad():
        each = [
            model.eval().double()(source[None], lengths, target[None, :-1])[0][0].softmax(dim=-1)
            for model in models
        ]
    mean = sum(each, torch.zeros(())) / len(each)
    least = mean.sort(dim=-1, descending=True).values[:, KEPT - 1 : KEPT]
    kept = mean.where(mean >= least, 0.0)
    return kept / kept.sum(dim=-1, keepdim=True)


def dense(soft: SoftTargets) -> Tensor:
    shape = (*soft.symbols.shape[:2], SYMBOLS)
    return torch.zeros(shape).scatter_add(2, soft.symbols, soft.probabilities)


@pytest.mark.parametrize("teachers", [1, 3])
def test_what_the_teachers_say(teachers: int) -> None:
    """For pairs in any order, the mean of the teachers, as computed pair by pair."""
    examples = pairs(700)  # more than one batch
    models = [small(seed).eval() for seed in range(teachers)]
    table = soft_targets(models, examples)
    generator = torch.Generator().manual_seed(3)
    rows = torch.randperm(700, generator=generator)[:41]
    soft, batch = table.rows(rows), examples.batch(rows)
    found = dense(soft)
    assert found.shape == (41, batch.target.shape[1] - 1, SYMBOLS)
    for n in range(len(rows)):
        length = int((batch.target[n] == EOS).nonzero()[0])
        pair = batch.source[n, : batch.source_lengths[n]], batch.target[n, : length + 1]
        torch.testing.assert_close(
            found[n, :length].double(), mean_probabilities(models, *pair), atol=1e-3, rtol=0
        )
        assert not found[n, length:].any()
    assert (found.sum(dim=-1)[batch.target[:, 1:] != PAD] - 1.0).abs().max() < 2e-3


def test_of_a_small_vocabulary_all_is_kept() -> None:
    examples = Examples.of([[3, 4], [4]], [[4, 3], [3]])
    model = Seq2Seq(ModelConfig(hidden=8, embedding=8), 5, 5).eval()
    soft = soft_targets([model], examples).rows(torch.tensor([0, 1]))
    assert soft.symbols.shape == (2, 3, 5)
    assert soft.symbols[0].sort().values.tolist() == [[0, 1, 2, 3, 4]] * 3


def test_the_loss_is_a_mean_of_both_cross_entropies() -> None:
    examples = pairs(23)
    examples.soft_targets = soft_targets([small(7).eval()], examples)
    batch, model = batch_of(examples), small()
    assert batch.soft_targets is not None
    arguments = batch.source, batch.source_lengths, batch.target
    found = model.loss(
        *arguments, soft_targets=batch.soft_targets, teacher_weight=0.3, label_smoothing=0.1
    )
    (gradient,) = torch.autograd.grad(found, model.output.weight)
    logits, _ = model(batch.source, batch.source_lengths, batch.target[:, :-1])
    expected = batch.target[:, 1:]
    log_probs, inside = logits.double().log_softmax(dim=-1), expected != PAD
    labels = cross_entropy(logits[inside].double(), expected[inside], label_smoothing=0.1)
    taught = -(dense(batch.soft_targets).double() * log_probs).sum(dim=-1)[inside].mean()
    right = 0.7 * labels + 0.3 * taught
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=0.0)
    (right_gradient,) = torch.autograd.grad(right, model.output.weight)
    torch.testing.assert_close(gradient, right_gradient, rtol=1e-3, atol=1e-5)
    # With R-Drop both passes of a pair have the same soft targets.
    twice = model.loss(*arguments, soft_targets=batch.soft_targets, teacher_weight=0.3, rdrop=2.0)
    once = model.loss(*arguments, soft_targets=batch.soft_targets, teacher_weight=0.3)
    torch.testing.assert_close(twice, once)  # no dropout here


def train(examples: Examples, **options: Any) -> tuple[Seq2Seq, list[float]]:
    """A trained model, and the losses of its steps."""
    torch.manual_seed(1)
    model = Seq2Seq(ModelConfig(hidden=32, embedding=16, dropout=0.0), SYMBOLS, SYMBOLS)
    losses: list[float] = []
    trainer = Trainer(model, examples, TrainingConfig(batch_size=32, lr=8e-3, **options))
    while not trainer.finished:
        trainer.run_epoch(lambda report: losses.append(report.loss), lambda: False)
        trainer.finish_epoch()
    return model.eval(), losses


def test_a_student_comes_to_say_what_its_teacher_says() -> None:
    """On held-out pairs it is closer to the teacher than a model trained on noisy labels alone."""
    teacher, _ = train(pairs(1500), epochs=4)
    unseen = batch_of(pairs(300, seed=1))
    given = unseen.source, unseen.source_lengths, unseen.target[:, :-1]
    inside = unseen.target[:, 1:] != PAD
    apart = {}
    for weight in (0.0, 0.8):
        examples = pairs(700, seed=2, noise=0.3)
        if weight:
            examples.soft_targets = soft_targets([teacher], examples)
        student, _ = train(examples, epochs=5, teacher_weight=weight or 0.5)
        with torch.no_grad():
            one, other = (m(*given)[0].log_softmax(dim=-1)[inside] for m in (student, teacher))
        apart[weight] = float(kl_div(one, other, log_target=True, reduction="batchmean"))
    assert apart[0.8] < 0.6 * apart[0.0]


def test_a_batch_in_parts_has_the_loss_of_the_whole() -> None:
    examples = pairs(130)
    examples.soft_targets = soft_targets([small(5).eval()], examples)
    _, whole = train(examples, epochs=1)
    _, parts = train(examples, epochs=1, accumulate=3)
    assert parts == pytest.approx(whole, abs=2e-4)


def test_a_file_of_other_pairs_is_refused(tmp_path: Path) -> None:
    distillation.save(soft_targets([small().eval()], pairs(30)), tmp_path)
    message = rf"{FILE} are missing, or do not belong to this run; start another run with teacher"
    with pytest.raises(InputError, match=message):
        distillation.load(tmp_path, pairs(31))
    (tmp_path / FILE).write_bytes(b"nothing")
    with pytest.raises(InputError, match=message):
        distillation.load(tmp_path, pairs(30))
    (tmp_path / FILE).unlink()
    with pytest.raises(InputError, match=message):
        distillation.load(tmp_path, pairs(30))


SIZE = "--numbers 9 --pairs 300 --longest 5 --test-longest 6 --hidden 16 --embedding 8".split()


def command(output: Path, *options: str) -> int:
    fixed = ["--threads", "1", "--batch-size", "64"]
    return main(["train", "reverse", "--output", str(output), *fixed, *options])


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Command line options with two teachers. Do not modify."""
    path = tmp_path_factory.mktemp("teachers")
    for name in ("1", "2"):
        assert command(path / name, *SIZE, "--seed", name, "--max-steps", "6") == 0
    return ["--teacher", str(path / "1"), "--teacher", str(path / "2")]


def test_a_run_with_teachers_can_be_resumed_without_them(
    teachers: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The results are the same, as the run holds the soft targets."""
    run, again = tmp_path / "run", tmp_path / "again"
    options = [*SIZE, "--epochs", "2", "--seed", "3", "--dropout", "0.2"]
    assert command(run, *options, *teachers) == 0
    assert "note: running 2 teachers over 300 pairs first" in capfd.readouterr().err
    shutil.copytree(run, again)
    shutil.rmtree(checkpoints(again)[-1])
    assert command(again, "--resume", *teachers[:2]) == 2
    assert "--teacher is not that of the run in" in capfd.readouterr().err
    assert command(again, "--resume", *teachers) == 0
    expected, found, without = (
        files.load_tensors(checkpoints(path)[-1], files.MODEL)
        for path in (run, again, _trained(tmp_path / "without", options))
    )
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not all(torch.equal(without[name], tensor) for name, tensor in expected.items())
    shutil.rmtree(checkpoints(again)[-1])
    (again / FILE).unlink()
    assert command(again, "--resume") == 2
    assert f"{FILE} are missing" in capfd.readouterr().err
    exported = tmp_path / "model"
    assert main(["export", str(run), "--output", str(exported)]) == 0
    assert teachers[1] not in (exported / files.METADATA).read_text()


def _trained(output: Path, options: list[str]) -> Path:
    assert command(output, *options) == 0
    return output


def test_what_cannot_work_is_refused(
    teachers: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    more = ["--numbers", "10", *SIZE[2:]]
    for options, message in (
        ([*more, *teachers], "--teacher: the source vocabulary of .* differs"),
        ([*SIZE, "--teacher", str(tmp_path / "none")], "no checkpoint at .*no such directory"),
        ([*SIZE, "--teacher-weight", "0.3"], "--teacher-weight needs a --teacher"),
        ([*SIZE, *teachers, "--teacher-weight", "0"], "--teacher-weight must be above 0"),
        ([*SIZE, *teachers, "--teacher-weight", "1.5"], "--teacher-weight must be above 0"),
    ):
        assert command(run, *options) == 2
        error = capfd.readouterr().err
        assert len(error.splitlines()) == 1
        assert re.search(message, error), error
        assert not run.exists()
