"""`evaluate --json` has everything that the table and the notes have."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from small_models import checkpoint, predictor

from fused_attn.cli import main
from fused_attn.seq2seq.inference import evaluate
from fused_attn.seq2seq.metrics import shown


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    model = checkpoint(tmp_path / "model", longest_source=3)
    first = predictor()("abc", max_length=3).text
    lines = [f"abc\t{first}", "abc\tein 文字", "dé\tfünf", "abcd\tzwei drei"]
    (tmp_path / "lines").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    options = ["--samples", "3", "--max-length", "3"]
    return ["evaluate", str(model), "--test", str(tmp_path / "lines"), *options]


def test_json_has_what_the_table_has(argv: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    table, notes = capfd.readouterr()
    assert main([*argv, "--json"]) == 0
    out, err = capfd.readouterr()
    assert err == notes and out.count("\n") == 1
    report = json.loads(out)
    assert [f"note: {text}" for text in report["notes"]] == notes.splitlines()
    assert len(report["notes"]) == 2  # a long source, and where the model comes from
    (unit, count), *rates = (
        re.split(" {2,}", row) for row in table.partition("\n\n")[0].splitlines()
    )
    assert (unit, int(count)) == (report["units"]["sources"], report["count"]) == ("lines", 3)
    assert report["units"]["symbols"] == "symbols"
    assert [[name, shown(name, value)] for name, value in report["metrics"].items()] == rates
    assert all(report[name] == value for name, value in report["metrics"].items())
    head, *rows = table.partition("\n\n")[2].splitlines()
    assert head.split() == ["source", "model", "reference"] and len(rows) == 3
    for row, sample in zip(rows, report["samples"], strict=True):
        texts = [sample["source_text"], sample["model_text"], " | ".join(sample["reference_texts"])]
        assert [cell for cell in re.split(" {2,}", row) if cell] == [text for text in texts if text]
        assert sample["source_text"] == "".join(sample["source"])
        assert sample["model_text"] == " ".join(sample["model"])
        assert sample["reference_texts"] == [" ".join(each) for each in sample["references"]]


def test_a_metric_that_is_no_number_is_null(
    argv: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "rates", lambda *_: {"lines wrong": float("nan")})
    assert main([*argv, "--json"]) == 0
    out = capfd.readouterr().out
    assert "NaN" not in out and json.loads(out)["lines wrong"] is None
