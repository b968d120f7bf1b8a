"""Files of earlier versions still work: runs resume, models predict, options are unchanged.

Version c4ccd64, from before the modules of the toolkit moved, wrote ``data/before_rooms``: two runs
stopped in the middle of an epoch, the logs of the same runs without a stop, an exported model, the
output of the command line, and the options of every command.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from pathlib import Path

import pytest

from fused_attn.cli import main, make_parser

BEFORE = Path(__file__).parent / "data" / "before_rooms"
# Rounding differs between machines; on one machine the results are equal bit for bit.
CLOSE = 2e-3

pytestmark = pytest.mark.threads(1)


@pytest.fixture(autouse=True)
def _in_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(BEFORE, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("run", ["plain", "taught"])
def test_a_run_goes_on_to_the_same_numbers(run: str) -> None:
    options = ["--on-disk"] if run == "taught" else []
    assert main(["train", "pairs", "--output", run, "--resume", "--threads", "1", *options]) == 0
    for log in ("steps", "epochs"):
        found, expected = rows(Path(run, f"{log}.csv")), rows(BEFORE / f"{run}-{log}.csv")
        assert len(found) == len(expected)
        for row, other in zip(found, expected, strict=True):
            assert row.keys() == other.keys()
            for name in row.keys() - {"seconds"}:
                exact = name in ("step", "epoch", "tokens")
                close = pytest.approx(float(other[name]), rel=0 if exact else CLOSE, abs=0)
                assert float(row[name]) == close, (log, name, row)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["exported", "--beam", "3", "--nbest", "2", "--scores"], "exported"),
        (
            [
                *("g2p", "hello", "attention", "pronunciation"),
                *("--beam", "5", "--nbest", "2", "--scores"),
            ],
            "g2p",
        ),
    ],
)
def test_a_model_predicts_what_it_did(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if expected == "exported":
        sources = [line.split("\t")[0] for line in Path("dev.tsv").read_text().splitlines()]
        arguments = [arguments[0], *sources, *arguments[1:]]
    # Scores of the version before int8 products.
    options = ["--threads", "1", "--compute", "float32"]
    assert main(["predict", *arguments, *options]) == 0
    found = capsys.readouterr().out.splitlines()
    lines = (BEFORE / f"{expected}-predictions.txt").read_text(encoding="utf-8").splitlines()
    assert len(found) == len(lines)
    for line, other in zip(found, lines, strict=True):
        score, _, target = line.partition("\t")
        other_score, _, other_target = other.partition("\t")
        assert target == other_target
        assert float(score) == pytest.approx(float(other_score), abs=1e-3)


def test_a_resumed_run_predicts_what_the_run_without_a_break_did(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "pairs", "--output", "plain", "--resume", "--threads", "1"]) == 0
    capsys.readouterr()
    sources = [line.split("\t")[0] for line in Path("dev.tsv").read_text().splitlines()]
    assert main(["predict", "plain", *sources, "--threads", "1"]) == 0
    assert capsys.readouterr().out == (BEFORE / "plain-predictions.txt").read_text()


def test_commands_keep_their_options() -> None:
    before = json.loads((BEFORE / "options.json").read_text())
    commands = next(
        action
        for action in make_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    ).choices
    assert before.keys() <= commands.keys()
    for name, options in before.items():
        actions = commands[name]._actions
        found = {text for action in actions for text in (action.option_strings or [action.dest])}
        assert set(options) <= found, name
