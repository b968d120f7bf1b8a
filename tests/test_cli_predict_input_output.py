"""`predict` reads arguments, a file or standard input, and writes standard output or a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from small_models import checkpoint, predictor

from fused_attn.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(checkpoint(tmp_path_factory.mktemp("models") / "model"))


WORDS = ["abc", "", "cab", "aéd"]


def expected() -> str:
    return "".join(f"{predictor()(word).text if word else ''}\n" for word in WORDS)


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text("".join(f"{word}\n" for word in WORDS))
    return path


@pytest.fixture
def as_stdin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    with ExitStack() as stack:
        yield lambda path: monkeypatch.setattr("sys.stdin", stack.enter_context(path.open("r")))


def test_a_file_is_read_and_the_targets_are_printed(
    model: str, words: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    links = tmp_path / "links.pharaoh"
    assert main(["predict", model, "--input", str(words), "--alignments", str(links)]) == 0
    assert capfd.readouterr() == (expected(), "")
    assert len(links.read_text().splitlines()) == len(WORDS)


def test_standard_input_is_read_and_a_file_is_written(
    model: str,
    words: Path,
    tmp_path: Path,
    as_stdin: Callable[[Path], None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    as_stdin(words)
    assert main(["predict", model, "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out").read_text() == expected()
    assert capfd.readouterr() == ("", "")


def test_arguments_are_written_to_a_file(model: str, tmp_path: Path) -> None:
    assert main(["predict", model, *WORDS, "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out").read_text() == expected()


def test_the_file_is_as_before_if_a_line_is_refused(
    model: str, words: Path, tmp_path: Path, as_stdin: Callable[[Path], None]
) -> None:
    as_stdin(words)
    (tmp_path / "out").write_text("before")
    assert main(["predict", model, "--strict", "--output", str(tmp_path / "out")]) == 2
    assert (tmp_path / "out").read_text() == "before"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "words.txt"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_another_encoding_is_one_error(
    encoding: str,
    model: str,
    words: Path,
    as_stdin: Callable[[Path], None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    words.write_text(words.read_text(), encoding=encoding)
    as_stdin(words)
    assert main(["predict", model]) == 2
    out, error = capfd.readouterr()
    assert out == "" and error.count("\n") == 1
    assert "standard input, line 1: not UTF-8 text but UTF-" in error and "iconv" in error


def test_a_line_with_nul_characters_cannot_be_read(
    words: Path,
    tmp_path: Path,
    as_stdin: Callable[[Path], None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("ab\tb a\nb\tb\n")
    run = str(tmp_path / "run")
    size = ["--hidden", "8", "--embedding", "4", "--max-steps", "1"]
    tokens = ["--source-tokens", "chars", "--target-tokens", "words"]
    assert main(["train", "pairs", "--train", str(pairs), "--output", run, *size, *tokens]) == 0
    capfd.readouterr()
    words.write_text("ab\nb", encoding="utf-16-le")  # without a byte order mark
    as_stdin(words)
    assert main(["predict", run, "--format", "json"]) == 1
    out, error = capfd.readouterr()
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["targets"] for record in records] == [[], []]
    assert all("NUL" in record["error"] for record in records)
    assert "line 1: a NUL character" in error


def test_standard_input_that_cannot_be_read(
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    class Directory:
        def fileno(self) -> int:
            return descriptor

    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        monkeypatch.setattr("sys.stdin", Directory())
        assert main(["predict", model, "--output", str(tmp_path / "out")]) == 2
    finally:
        os.close(descriptor)
    assert "cannot read standard input: Is a directory" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []
