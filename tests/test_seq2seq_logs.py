"""A damaged log does not stop a run: what can be read stays, and the file is kept beside it."""

from __future__ import annotations

import csv
import dataclasses
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from fused_attn.cli import main
from fused_attn.seq2seq.training import logs
from fused_attn.seq2seq.training.logs import EPOCHS, STEPS, RunLog
from fused_attn.seq2seq.training.trainer import Position, StepReport

STEP_ROWS = [f"{n},{1 + n // 4},{5 / n:.4f},0.001,{20 + n},0.0" for n in range(1, 9)]
STEP_LINES = ["step,epoch,loss,lr,tokens,sampling", *STEP_ROWS]
EPOCH_LINES = ["epoch,step,train_loss,lines wrong,seconds", "1,4,2.5,0.5,1.2", "2,8,1.5,0.25,1.1"]
# Where the run goes on: two steps into the third epoch.
THERE = Position(step=8, epoch=2)


def text(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def write(directory: Path, steps: bytes = b"", epochs: bytes = b"") -> None:
    (directory / STEPS).write_bytes(steps or text(STEP_LINES))
    (directory / EPOCHS).write_bytes(epochs or text(EPOCH_LINES))


def go_on(directory: Path) -> None:
    """One more step and one more epoch."""
    with RunLog(directory, THERE) as log:
        log.step(StepReport(9, 3, 0.5, 0.001, 29, 0.0))
        head = {"epoch": 3, "step": 9, "train_loss": 1.0}
        log.epoch({**head, "lines wrong": 0.125, "seconds": 1.0})


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def with_line(number: int, line: bytes) -> bytes:
    lines = text(STEP_LINES).split(b"\n")
    lines[number] = line
    return b"\n".join(lines)


def test_the_columns_of_a_step_are_known() -> None:
    names = [field.name for field in dataclasses.fields(StepReport)]
    assert [*logs._COLUMNS[STEPS]] == names == STEP_LINES[0].split(",")


WHOLE = text(STEP_LINES)
# What is in the file, and how many of its eight rows can be read.
DAMAGED = {
    "a NUL byte": (with_line(3, b"3,1,\0.5,0.001,23,0.0"), 7),
    "not UTF-8": (with_line(2, b"2,1,\xff\xfe,0.001,22,0.0"), 7),
    "a text": (with_line(5, b"5,two,1.0,0.001,25,0.0"), 7),
    "a real number of steps": (with_line(5, b"5.5,2,1.0,0.001,25,0.0"), 7),
    "a negative step": (with_line(5, b"-5,2,1.0,0.001,25,0.0"), 7),
    "5,000 digits": (with_line(5, b"9" * 5000 + b",2,1.0,0.001,25,0.0"), 7),
    "infinity": (with_line(5, b"5,2,inf,0.001,25,0.0"), 7),
    "too few columns": (with_line(4, b"4,2,1.25"), 7),
    "too many columns": (with_line(4, STEP_ROWS[3].encode() + b",1"), 7),
    "a blank line": (with_line(4, b""), 7),
    "an open quote": (with_line(4, b'4,2,"1.25,0.001,24,0.0'), 7),
    "a long field": (with_line(4, b"4,2," + b"1" * 200_000 + b",0.001,24,0.0"), 7),
    "no first line": (text(STEP_ROWS), 7),
    "another first line": (with_line(0, b"a,b,c,d,e,f"), 8),
    "a first line that is not UTF-8": (with_line(0, b"\xff\xfes\0t\0e\0p\0"), 8),
    "columns twice": (with_line(0, b"step,step,epoch,loss,lr,tokens"), 8),
    "only noise": (random.Random(1).randbytes(4000), 0),
    "NUL bytes": (bytes(4000) + b"\n", 0),
    "a log of epochs": (text(EPOCH_LINES), 0),
    "no loss": (text([",".join(line.split(",")[:2]) for line in STEP_LINES]), 0),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_log_is_kept_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    damaged, readable = DAMAGED[kind]
    write(tmp_path, damaged)
    go_on(tmp_path)
    rows = read(tmp_path / STEPS)
    assert len(rows) == readable + 1
    assert rows[-1]["step"] == "9" and list(rows[-1]) == STEP_LINES[0].split(",")
    known = {row.split(",")[0]: row for row in STEP_ROWS}
    assert all(",".join(row.values()) == known[row["step"]] for row in rows[:-1])
    assert (tmp_path / f"{STEPS}.damaged").read_bytes() == damaged
    assert len(read(tmp_path / EPOCHS)) == 3
    note = capsys.readouterr().err
    assert note.startswith(f"note: {tmp_path / STEPS}: ") and note.count("\n") == 1
    assert f"the file is kept as {STEPS}.damaged" in note
    go_on(tmp_path)  # the log is as it should be now
    assert capsys.readouterr().err == ""


def test_epochs_are_kept_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = text([*EPOCH_LINES[:2], "2,8,\0,0.25,1.1"])
    write(tmp_path, epochs=damaged)
    go_on(tmp_path)
    assert [row["epoch"] for row in read(tmp_path / EPOCHS)] == ["1", "3"]
    assert (tmp_path / f"{EPOCHS}.damaged").read_bytes() == damaged
    # The metrics of another task: no row has the columns of this one.
    other = text(["epoch,step,train_loss,BLEU,seconds", "1,4,2.5,0.5,1.2"])
    write(tmp_path, epochs=other)
    capsys.readouterr()
    go_on(tmp_path)
    assert [row["epoch"] for row in read(tmp_path / EPOCHS)] == ["3"]
    assert (tmp_path / f"{EPOCHS}.damaged-2").read_bytes() == other
    assert (tmp_path / f"{EPOCHS}.damaged").read_bytes() == damaged
    assert "it has other columns" in capsys.readouterr().err


@pytest.mark.parametrize(
    "steps",
    [
        WHOLE + b"9,3,0.4,0.00",  # a kill leaves half a line
        WHOLE + text(["9,3,0.4,0.001,29,0.0", "10,3,0.4,0.001,30,0.0"]),  # after the checkpoint
        WHOLE.replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + WHOLE,
    ],
)
def test_what_is_no_damage_leaves_no_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: bytes
) -> None:
    write(tmp_path, steps)
    go_on(tmp_path)
    assert (tmp_path / STEPS).read_bytes() == text([*STEP_LINES, "9,3,0.5,0.001,29,0.0"])
    assert not list(tmp_path.glob("*.damaged*")) and capsys.readouterr().err == ""


def mutations(count: int) -> list[tuple[str, bytes]]:
    """Damage of every kind to either file, always the same."""
    draw = random.Random(3)
    kinds: dict[str, Callable[[bytearray, int], object]] = {
        "flip": lambda data, at: data.__setitem__(at, data[at] ^ 1 << draw.randrange(8)),
        "cut": lambda data, at: data.__delitem__(slice(at, at + draw.randrange(1, 9))),
        "truncate": lambda data, at: data.__delitem__(slice(at, None)),
        "insert": lambda data, at: data.__setitem__(slice(at, at), draw.randbytes(5)),
        "swap": lambda data, at: data.reverse() if at % 2 else data.extend(data[:at]),
    }
    found = []
    for number in range(count):
        name = (STEPS, EPOCHS)[number % 2]
        data = bytearray(text(STEP_LINES if name == STEPS else EPOCH_LINES))
        for _ in range(draw.randrange(1, 4)):
            if data:
                draw.choice(list(kinds.values()))(data, draw.randrange(len(data)))
        found.append((name, bytes(data)))
    return found


def test_no_mutation_stops_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, (name, data) in enumerate(mutations(300)):
        directory = tmp_path / str(number)
        directory.mkdir()
        write(directory)
        (directory / name).write_bytes(data)
        go_on(directory)
        assert read(directory / STEPS)[-1]["step"] == "9"
        assert read(directory / EPOCHS)[-1]["epoch"] == "3"


def test_curves_of_a_damaged_log_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, plot = tmp_path / "run", tmp_path / "curves.svg"
    run.mkdir()
    cases = [(STEPS, damaged) for damaged, _ in list(DAMAGED.values())[::4]] + mutations(3)
    for name, data in cases:
        write(run)
        (run / name).write_bytes(data)
        code = main(["curves", str(run), "--output", str(plot)])
        error = capsys.readouterr().err
        assert code in (0, 2) and error.count("\n") == (code == 2 or bool(error)), error
        assert not error or str(run) in error
        assert (run / name).read_bytes() == data


@pytest.mark.timeout(30)
def test_a_log_that_is_no_file_is_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / STEPS)
    with pytest.raises(OSError, match="not a regular file"):
        go_on(tmp_path)
    assert main(["curves", str(tmp_path), "--output", str(tmp_path / "curves.svg")]) == 2
    expected = f"error: cannot read {tmp_path / STEPS}: it is not a regular file\n"
    assert capsys.readouterr().err.endswith(expected)
