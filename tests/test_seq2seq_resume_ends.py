"""Where a resumed run ends, what it says there, and where its scheduled sampling starts."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from small_runs import resume, train

from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.checkpoints.find import best_checkpoint, checkpoints
from fused_attn.seq2seq.training import prepare
from fused_attn.seq2seq.training.trainer import Trainer

BATCHES = 3  # in an epoch


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "lines.tsv"
    texts = (" ".join(f"{number:06b}") for number in range(8 * BATCHES))
    path.write_text("".join(f"{text}\t{text[::-1]}\n" for text in texts))
    return path


def rows(run: Path, name: str) -> list[dict[str, str]]:
    with (run / name).open() as file:
        return list(csv.DictReader(file))


def test_a_stop_during_the_last_evaluation_loses_no_epoch(
    lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, evaluate = tmp_path / "run", prepare._by_targets

    def stopped(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(prepare, "_by_targets", stopped)
        assert train(run, lines, "--epochs", "1") == 130
    assert best_checkpoint(checkpoints(run)) is None and not (run / "epochs.csv").exists()
    assert resume(run) == 0
    best = best_checkpoint(checkpoints(run))
    assert best is not None and best.name == f"step-{BATCHES:07}-epoch-01"
    assert len(rows(run, "steps.csv")) == BATCHES and len(rows(run, "epochs.csv")) == 1


@pytest.mark.parametrize(
    ("options", "larger"),
    [
        (["--epochs", "1"], ["--epochs"]),
        (["--epochs", "9", "--max-steps", "4"], ["--max-steps"]),
        (["--epochs", "1", "--max-steps", "3"], ["--epochs", "--max-steps"]),
        (["--epochs", "9", "--patience", "1", "--lr", "1e-7"], ["--patience"]),
    ],
)
def test_a_complete_run_names_the_options_that_continue_it(
    lines: Path,
    tmp_path: Path,
    options: list[str],
    larger: list[str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    assert train(run, lines, *options) == 0
    before = len(rows(run, "steps.csv"))
    assert resume(run) == 0
    message = f"; --resume with a larger {' and '.join(larger)} continues it\n"
    assert capfd.readouterr().out.endswith(message)
    for count, option in enumerate(larger, start=1):
        given = [text for name in larger[:count] for text in (name, "20")]
        assert resume(run, *given) == 0
        assert (len(rows(run, "steps.csv")) > before) == (count == len(larger)), option


def test_scheduled_sampling_in_a_resumed_run(lines: Path, tmp_path: Path) -> None:
    """It starts where that of a run with the new options does, from the step that was reached."""
    run = tmp_path / "run"
    assert train(run, lines, "--epochs", "1") == 0
    assert resume(run, "--epochs", "3", "--sampling", "linear", "--sampling-max", "0.8") == 0
    last = 3 * BATCHES - 1
    expected = [0.0] * BATCHES + [0.8 * step / last for step in range(BATCHES, 3 * BATCHES)]
    assert [float(row["sampling"]) for row in rows(run, "steps.csv")] == pytest.approx(expected)
    # It now waits for the error of an epoch, which is never at most -1.
    assert resume(run, "--epochs", "4", "--sampling-after", "-1") == 0
    assert {float(row["sampling"]) for row in rows(run, "steps.csv")[3 * BATCHES :]} == {0.0}


def test_sampling_that_waited_starts_at_the_end_of_an_epoch(lines: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(run, lines, "--epochs", "1") == 0
    waits = ["--sampling", "constant", "--sampling-after", "99", "--sampling-max", "0.5"]
    assert resume(run, "--epochs", "3", *waits) == 0
    assert resume(run, "--epochs", "4") == 0
    found = [float(row["sampling"]) for row in rows(run, "steps.csv")]
    assert found == [0.0] * (2 * BATCHES) + [0.5] * (2 * BATCHES)


@pytest.mark.parametrize("stop", [None, 2 * BATCHES - 1], ids=["between epochs", "within an epoch"])
def test_guided_alignment_skips_pairs_that_the_run_had(
    lines: Path,
    tmp_path: Path,
    stop: int | None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Half of the lines have links: with these alone an epoch has half of the batches."""
    run, data, step = tmp_path / "run", tmp_path / "links.tsv", Trainer._step
    linked = "".join(f"{line}\t0-0\n" for line in lines.read_text().splitlines())
    data.write_text(linked + linked.replace("0-0", "CC-BY"))

    def signalled(trainer: Trainer, *arguments: Any) -> Any:
        report = step(trainer, *arguments)
        if trainer.position.step == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return report

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", signalled)
        code = train(run, lines, "--train", str(data), "--skip-bad", "--epochs", "1")
        assert code == (0 if stop is None else 130)
    capfd.readouterr()
    assert resume(run, "--guided", "0.5", "--epochs", "2") == 0
    assert f"skipped {8 * BATCHES} bad lines" in capfd.readouterr().err
    first = 2 * BATCHES if stop is None else stop + BATCHES  # what was begun begins again
    found = [int(row["epoch"]) for row in rows(run, "steps.csv")]
    assert found == [1] * first + [2] * BATCHES


@pytest.mark.parametrize(
    ("key", "value"), [("teacher", None), ("teacher", "g2p"), ("teacher", [1]), ("start_from", 1)]
)
def test_models_that_a_damaged_checkpoint_names(
    lines: Path, tmp_path: Path, key: str, value: object, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(run, lines, "--epochs", "1") == 0
    path = checkpoints(run)[-1] / files.METADATA
    meta = json.loads(path.read_text())
    del meta[files.DIGESTS]
    path.write_text(json.dumps(meta | {key: value}))
    capfd.readouterr()
    assert resume(run, "--epochs", "2") == 2
    (error,) = capfd.readouterr().err.splitlines()
    assert f"{path.parent} is damaged: {key} must be a" in error
    assert len(rows(run, "epochs.csv")) == 1


def test_an_epoch_that_max_steps_has_cut_short_is_not_made_up_for(
    lines: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert train(run, lines, "--epochs", "9", "--max-steps", str(BATCHES + 1)) == 0
    assert resume(run, "--epochs", "3", "--max-steps", "100") == 0
    found = [int(row["epoch"]) for row in rows(run, "steps.csv")]
    assert found == [1] * BATCHES + [2] + [3] * BATCHES
