"""A run goes on with more epochs, another learning rate, other batches, or moved data."""

from __future__ import annotations

import csv
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from small_runs import resume, train

from fused_attn import seq2seq
from fused_attn.seq2seq import InputError, ModelConfig, TrainingConfig
from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.checkpoints.find import last_checkpoint

WORDS = "ab ba aab bba abab baba aabb bbaa abba baab aaa bbb abb baa aba bab".split()
# Every pair several times in another form, so that an epoch has some batches.
PAIRS = [(" ".join(word), " ".join(reversed(word.upper()))) for word in WORDS * 3]
# With this schedule a step does not depend on how many will follow.
FLAT = ["--lr-schedule", "constant", "--warmup", "0"]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "lines.tsv"
    path.write_text("".join(f"{source}\t{target}\n" for source, target in PAIRS))
    return path


def steps(run: Path) -> list[dict[str, str]]:
    with (run / "steps.csv").open() as file:
        return list(csv.DictReader(file))


def parameters(run: Path) -> dict[str, torch.Tensor]:
    return files.load_tensors(last_checkpoint(run), files.MODEL)


@pytest.fixture(scope="module")
def two(lines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of two epochs."""
    run = tmp_path_factory.mktemp("two") / "run"
    assert train(run, lines, *FLAT, "--epochs", "2") == 0
    return run


def test_more_epochs_are_those_of_a_longer_run(
    two: Path, lines: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    longer, run = tmp_path / "longer", tmp_path / "run"
    assert train(longer, lines, *FLAT, "--epochs", "5") == 0
    shutil.copytree(two, run)
    capfd.readouterr()
    assert resume(run, "--epochs", "3") == 0
    assert "note: resuming with epochs 3 instead of 2" in capfd.readouterr().err
    assert resume(run, "--epochs", "5") == 0
    assert steps(run) == steps(longer)
    expected = parameters(longer)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in parameters(run).items())
    # The change is part of the run from now on.
    assert resume(run) == 0
    assert "complete: all 30 steps are done; --resume with a larger --epochs" in str(
        capfd.readouterr()
    )


def test_a_falling_schedule_spans_all_epochs(lines: Path, tmp_path: Path) -> None:
    """The learning rates of the new epochs are those of a run that was to have them all."""
    run = tmp_path / "run"
    assert train(run, lines, "--epochs", "2", "--warmup", "0", "--lr", "0.01") == 0
    assert resume(run, "--epochs", "4") == 0
    rates = [float(row["lr"]) for row in steps(run)]
    per_epoch = len(rates) // 4
    # Linear to 0 one step after the last: (total - step) / total.
    for total, first, last in (
        (2 * per_epoch, 0, 2 * per_epoch),
        (4 * per_epoch, 2 * per_epoch, 4 * per_epoch),
    ):
        expected = [0.01 * (total - step) / total for step in range(first, last)]
        assert rates[first:last] == pytest.approx(expected)


def test_another_learning_rate_and_schedule(two: Path, tmp_path: Path) -> None:
    run = shutil.copytree(two, tmp_path / "run")
    assert resume(run, "--epochs", "3", "--lr", "0.0005") == 0
    rates = [float(row["lr"]) for row in steps(run)]
    third = len(rates) // 3
    assert rates == pytest.approx([0.002] * (2 * third) + [0.0005] * third)
    assert resume(run, "--epochs", "4", "--lr-schedule", "cosine") == 0
    rates = [float(row["lr"]) for row in steps(run)][3 * third :]
    assert rates[0] < 0.0005 and rates == sorted(rates, reverse=True) and rates[-1] > 0


@pytest.mark.parametrize("options", [["--batch-size", "5"], ["--batch-tokens", "40"]])
def test_other_batches(
    two: Path, tmp_path: Path, options: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(two, tmp_path / "run")
    per_epoch = len(steps(run)) // 2
    # Targets have as many symbols as sources have, and one for their end.
    symbols = sum(len(source.split()) + 1 for source, _ in PAIRS)
    assert resume(run, "--epochs", "4", *options) == 0
    rows = steps(run)
    for epoch in range(1, 5):
        own = [int(row["tokens"]) for row in rows if int(row["epoch"]) == epoch]
        assert sum(own) == symbols, "every pair once in each epoch"
        assert (len(own) == per_epoch) == (epoch <= 2)
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    assert "begins again" not in capfd.readouterr().err  # the epochs before were complete


def test_an_epoch_that_was_begun_begins_again_with_other_batches(
    two: Path, tmp_path: Path, lines: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    per_epoch = len(steps(two)) // 2
    assert train(run, lines, *FLAT, "--epochs", "2") == 0
    # Stop it in the middle of the second epoch: by hand, as a signal would.
    directory = files_of_a_stop(run, per_epoch + 2)
    assert resume(directory, "--batch-size", "4") == 0
    assert "note: epoch 2 begins again: its batches have changed" in capfd.readouterr().err
    own = [int(row["tokens"]) for row in steps(directory) if int(row["step"]) > per_epoch + 2]
    assert sum(own) == sum(len(source.split()) + 1 for source, _ in PAIRS)


def files_of_a_stop(run: Path, step: int) -> Path:
    """A copy of a run, stopped after a step."""
    from fused_attn.seq2seq.training.directory import owned
    from fused_attn.seq2seq.training.prepare import Machine
    from fused_attn.seq2seq.training.processes import launch
    from fused_attn.seq2seq.training.progress import NoProgress
    from fused_attn.seq2seq.training.resume import resume_run

    copy = run.with_name(f"{run.name}-stopped")
    shutil.copytree(run, copy)
    for path in (copy / "checkpoints").glob("step-*-epoch-02"):
        shutil.rmtree(path)
    with owned(copy):
        again = resume_run(copy, NoProgress(), Machine(launch("cpu")))
        assert not again.train(lambda: again.trainer.position.step >= step)
    assert last_checkpoint(copy).name == f"step-{step:07}"
    return copy


def test_a_run_that_stopped_early_goes_on_with_more_patience(
    lines: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    # The first epochs get everything wrong: the second one is no improvement.
    slow = ["--epochs", "6", "--lr", "1e-7", "--patience", "1"]
    assert train(run, lines, *slow) == 0
    done = len(steps(run))
    capfd.readouterr()
    assert resume(run) == 0
    assert "no improvement for 1 epochs; --resume with a larger --patience" in str(
        capfd.readouterr()
    )
    assert resume(run, "--patience", "2") == 0
    assert len(steps(run)) == done // 2 * 3


def test_what_changes_the_steps_needs_what_it_needs(
    two: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(two, tmp_path / "run")
    before = sorted(run.rglob("*"))
    for options, message in (
        (["--guided", "0.5"], "--guided needs alignment links"),
        (["--teacher-weight", "0.5"], "--teacher-weight needs a --teacher"),
        (["--rdrop", "1", "--dropout", "0"], "--rdrop needs a dropout above 0"),
        (["--lr", "-1"], "--lr must be a positive number"),
        (["--seed", "5"], "--seed is not that of the run in .*, 1: leave it out to resume, or"),
        (["--hidden", "9"], "--hidden is not that of the run in .*, 8: .*with --start-from"),
        (["--tokens", "chars"], "--tokens is not that of the run"),
    ):
        assert resume(run, "--epochs", "3", *options) == 2
        error = capfd.readouterr().err.splitlines()[-1]
        assert re.search(message, error), error
    assert sorted(run.rglob("*")) == before


def test_dropout_and_precision_may_change(two: Path, tmp_path: Path) -> None:
    run = shutil.copytree(two, tmp_path / "run")
    options = ["--dropout", "0.4", "--precision", "bf16", "--accumulate", "2", "--clip", "5"]
    assert resume(run, "--epochs", "3", *options) == 0
    meta = files.load_metadata(last_checkpoint(run))
    assert meta["model"]["dropout"] == 0.4 and meta["training"]["precision"] == "bf16"


def test_data_that_has_moved(
    two: Path, lines: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Equal data is accepted wherever it lies, and other data nowhere."""
    run = shutil.copytree(two, tmp_path / "run")
    data = tmp_path / "first.tsv"
    shutil.copy(lines, data)
    own = tmp_path / "own"
    assert train(own, data, *FLAT, "--epochs", "2") == 0
    moved = tmp_path / "elsewhere" / "second.tsv"
    moved.parent.mkdir()
    data.rename(moved)
    capfd.readouterr()
    assert resume(own, "--epochs", "3") == 2
    error = capfd.readouterr().err
    assert f"there is no file {data}; --train FILE names the file with the same data" in error
    given = ["--train", str(moved), "--dev", str(moved)]
    assert resume(own, "--epochs", "3", *given) == 0
    assert resume(own, "--epochs", "4") == 0, "the run knows now where the data lies"
    # From another directory, by a relative path.
    there = Path.cwd()
    os.chdir(moved.parent)
    try:
        again = ["--train", "second.tsv", "--dev", "second.tsv"]
        assert resume(run, "--epochs", "3", *again) == 0
    finally:
        os.chdir(there)
    other = tmp_path / "other.tsv"
    other.write_text(lines.read_text().replace("a b\t", "b b\t", 1))
    capfd.readouterr()
    assert resume(own, "--epochs", "5", "--train", str(other), "--dev", str(moved)) == 2
    assert "the training pairs have changed" in capfd.readouterr().err
    assert resume(own, "--epochs", "5", "--train", str(moved), "--dev", str(other)) == 2
    assert "the development pairs have changed" in capfd.readouterr().err


def test_from_python(two: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shape = ModelConfig(hidden=8, embedding=8)
    recipe = TrainingConfig(epochs=1, batch_size=8, lr_schedule="constant", warmup=0.0)
    seq2seq.fit(PAIRS, dev=PAIRS, output=run, model=shape, training=recipe, progress=False)
    longer = TrainingConfig(epochs=3, batch_size=8, lr_schedule="constant", warmup=0.0, lr=1e-3)
    capfd.readouterr()
    seq2seq.fit(PAIRS, dev=PAIRS, output=run, training=longer, resume=True)
    assert "resuming with epochs 3 instead of 1, lr 0.001 instead of 0.002" in str(
        capfd.readouterr()
    )
    rates = [float(row["lr"]) for row in steps(run)]
    assert rates == pytest.approx([0.002] * (len(rates) // 3) + [0.001] * (len(rates) // 3 * 2))
    with pytest.raises(InputError, match=r"^seed is not that of the run"):
        seq2seq.fit(
            PAIRS,
            dev=PAIRS,
            output=run,
            resume=True,
            progress=False,
            training=TrainingConfig(seed=3),
        )


@pytest.mark.parametrize("name", [files.METADATA, files.MODEL, files.TRAINING])
def test_a_damaged_last_checkpoint(
    two: Path, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The error says how to go on from the one before, and that gives the same results."""
    run = shutil.copytree(two, tmp_path / "run")
    before, last = sorted((run / "checkpoints").iterdir())[-2:]
    (last / name).write_bytes((last / name).read_bytes()[:-9])
    capfd.readouterr()
    assert resume(run, "--epochs", "3") == 2
    (error,) = [line for line in capfd.readouterr().err.splitlines() if "error: " in line]
    assert f"{last} is damaged" in error
    assert error.endswith(f"to resume from the one before it, {before.name}, remove it")
    shutil.rmtree(last)
    assert resume(run) == 0
    assert steps(run) == steps(two)
    expected = parameters(two)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in parameters(run).items())


def test_a_damaged_older_checkpoint_does_not_stop_training(
    two: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(two, tmp_path / "run")
    first = sorted((run / "checkpoints").iterdir())[0]
    (first / files.METADATA).write_text("{}")
    # It trains to the end; then nobody can say which checkpoint is the best.
    assert resume(run, "--epochs", "4") == 2
    assert f"the checkpoint {first} is damaged" in capfd.readouterr().err.splitlines()[-1]
    assert len(steps(run)) == 2 * len(steps(two))
    assert first.exists(), "it may have been the best one"
    assert last_checkpoint(run).name.endswith("epoch-04")


def test_some_fields_from_python(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A mapping sets some fields; the others are the task's, follow the data, or are the run's."""
    run = tmp_path / "run"
    shape = {"hidden": 8, "dropout": 0.0}
    options = {"dev": PAIRS, "output": run}
    seq2seq.fit(PAIRS, model=shape, training={"epochs": 1, "lr": 1e-3}, **options)  # type: ignore[arg-type]
    assert "chosen for this data: batches of 32 (48 pairs)" in capfd.readouterr().err
    meta = files.load_metadata(last_checkpoint(run))
    assert (meta["model"]["hidden"], meta["model"]["embedding"]) == (8, 64)
    assert (meta["training"]["batch_size"], meta["training"]["lr"]) == (32, 1e-3)
    seq2seq.fit(PAIRS, training={"epochs": 2}, resume=True, **options)  # type: ignore[arg-type]
    assert "note: resuming with epochs 2 instead of 1\n" in capfd.readouterr().err
    assert files.load_metadata(last_checkpoint(run))["training"]["batch_size"] == 32
    for field, message in (
        ({"training": {"epoch": 3}}, "^training has no field 'epoch'; there are epochs"),
        ({"training": {"epochs": "3"}}, "^epochs must be"),
        ({"training": {"epochs": 0}}, "^epochs must be"),
        ({"training": [3]}, "^training must be a TrainingConfig or a mapping of its fields, got"),
        ({"model": {"hidden": 9}}, "^hidden is not that of the run"),
        ({"training": {"teacher_weight": 0.5}}, "^teacher_weight needs a teacher"),
    ):
        with pytest.raises(InputError, match=message):
            seq2seq.fit(PAIRS, resume=True, progress=False, **options, **field)  # type: ignore[arg-type]


def test_a_recipe_and_some_fields(tmp_path: Path) -> None:
    """Pairs in a batch win over the symbols in a batch of the recipe of translate."""
    run = tmp_path / "run"
    some = {"batch_size": 16, "max_steps": 1}
    shape = {"hidden": 8, "embedding": 8}
    options = {"task": "translate", "tokens": "words", "dev": PAIRS, "progress": False}
    seq2seq.fit(PAIRS, output=run, model=shape, training=some, **options)  # type: ignore[arg-type]
    training = files.load_metadata(last_checkpoint(run))["training"]
    assert (training["batch_size"], training["batch_tokens"]) == (16, None)
    assert training["label_smoothing"] == 0.1  # of the recipe
