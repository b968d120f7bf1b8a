"""A symbol that a model of one's own texts does not know is read as ``<unk>``, with a note."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_models import LETTERS, checkpoint

from fused_attn.cli import main
from fused_attn.seq2seq.vocabulary import UNKNOWN


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "model"
    return str(checkpoint(path, letters=[UNKNOWN, *LETTERS]))


def notes(capfd: pytest.CaptureFixture[str]) -> list[str]:
    return capfd.readouterr().err.splitlines()


def test_predict_names_the_symbols(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", model, "abc", "a@b@", "qrxyza"]) == 0
    out, error = capfd.readouterr()
    assert len(out.splitlines()) == 3
    assert error.splitlines() == [
        "note: argument 2 has 1 unknown symbol, read as <unk>: '@'",
        "note: argument 3 has 5 unknown symbols, read as <unk>: 'q' 'r' 'x' 'y' ...",
    ]


@pytest.mark.parametrize("to_a_file", [False, True])
def test_after_ten_notes_there_is_a_count(
    to_a_file: bool, model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    source.write_text("abc\n@\n" * 12)
    output = ["--output", str(tmp_path / "out")] if to_a_file else []
    assert main(["predict", model, "--input", str(source), *output]) == 0
    found = notes(capfd)
    ending = "has 1 unknown symbol, read as <unk>: '@'"
    assert found[:-1] == [f"note: line {number} {ending}" for number in range(2, 22, 2)]
    assert found[-1] == "note: 12 of 24 lines have unknown symbols"


def test_explain_and_chat(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", model, "a@", "--output", str(tmp_path / "page.html")]) == 0
    assert notes(capfd) == ["note: TEXT has 1 unknown symbol, read as <unk>: '@'"]
    (tmp_path / "lines").write_text("ab\na@\n")
    with (tmp_path / "lines").open() as file:
        monkeypatch.setattr("sys.stdin", file)
        assert main(["chat", model]) == 0
    assert notes(capfd) == ["note: this message has 1 unknown symbol, read as <unk>: '@'"]


def test_the_unknown_symbol_itself_is_known(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = {"source_tokens": "words", "target_tokens": "words"}
    model = checkpoint(tmp_path / "model", letters=[UNKNOWN, *LETTERS], tokens=words)
    assert main(["predict", str(model), f"a {UNKNOWN} b"]) == 0
    assert notes(capfd) == []
