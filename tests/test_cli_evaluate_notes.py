"""`evaluate` says that a model was trained on what it is evaluated on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fused_attn.cli import main

TINY = ["--hidden", "8", "--embedding", "4", "--max-steps", "1"]


def notes(run: Path, capfd: pytest.CaptureFixture[str], *options: str) -> list[str]:
    capfd.readouterr()
    assert main(["evaluate", str(run), "--json", *options]) == 0
    found: list[str] = json.loads(capfd.readouterr().out)["notes"]
    return found


def test_the_test_set_of_the_run_is_checked_too(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train, test = tmp_path / "train.tsv", tmp_path / "test.tsv"
    train.write_text("a\tA\nb\tB\nc\tC\n")
    test.write_text("a\tA\nc\tC\nd\tA B\n")
    run = tmp_path / "run"
    files = ["--train", str(train), "--test", str(test)]
    assert main(["train", "pairs", *files, "--output", str(run), *TINY]) == 0
    expected = ["2 of these lines are in the training set of the model"]
    assert notes(run, capfd, "--test", str(test)) == expected
    assert notes(run, capfd) == expected


def test_few_dialogs_are_evaluated_on_their_own_training(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dialogs, run = tmp_path / "dialogs.txt", tmp_path / "run"
    dialogs.write_text("hi\nhello\n\nbye\nsee you\n")
    options = ["--dialogs", str(dialogs), "--tokens", "words", *TINY]
    assert main(["train", "chat", "--output", str(run), *options]) == 0
    assert notes(run, capfd) == ["2 of these utterances are in the training set of the model"]
