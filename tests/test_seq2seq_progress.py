"""Progress: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from fused_attn.seq2seq.training import progress
from fused_attn.seq2seq.training.progress import BarProgress, LineProgress, Progress, make_progress
from fused_attn.seq2seq.training.trainer import StepReport


def follow(shown: Progress) -> None:
    with shown:
        shown.start(10, 40)
        for step in range(11, 31):
            shown.step(StepReport(step=step, epoch=2, loss=1.25, lr=1e-3, tokens=100, sampling=0.0))
        shown.epoch(2, 1.2345, {"WER": 0.3, "PER": 0.075}, 12.0)


def test_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 2))  # every call advances it by two seconds
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    stream = io.StringIO()
    follow(LineProgress(stream))
    lines = stream.getvalue().splitlines()
    assert lines[-1] == "epoch 2: loss 1.2345  dev WER 30.00 %  PER 7.50 %  12 s"
    assert 3 <= len(lines) < 20
    shape = r"step (1[1-9]|2\d|30)/40  epoch 2  loss 1\.2500  \d+ tokens/s  \d:\d\d left"
    assert all(re.fullmatch(shape, line) for line in lines[:-1])


def test_bar() -> None:
    stream = io.StringIO()
    follow(BarProgress(Console(file=stream, force_terminal=True, width=120)))
    text = stream.getvalue()
    for part in (
        "epoch 2: loss 1.2345  dev WER 30.00 %",
        "30/40",
        "loss 1.2500",
        "tokens/s",
        "left",
    ):
        assert part in text


def test_only_a_terminal_gets_the_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert isinstance(make_progress(Terminal()), BarProgress)
    assert isinstance(make_progress(io.StringIO()), LineProgress)


def test_progress_goes_to_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    follow(make_progress())
    out, err = capsys.readouterr()
    assert out == "" and "epoch 2: loss 1.2345" in err
    monkeypatch.setattr("sys.stderr", None)  # it is closed
    follow(make_progress())
    assert capsys.readouterr().out == ""
