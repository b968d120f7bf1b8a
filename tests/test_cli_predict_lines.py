"""`predict` writes as many lines as it reads, whatever the lines are."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from small_models import checkpoint, predictor

from fused_attn.cli import main, make_parser

COMMAND = [sys.executable, "-m", "fused_attn"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(checkpoint(tmp_path_factory.mktemp("models") / "model"))


@pytest.fixture
def lines_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[bytes], None]]:
    """Give bytes to standard input."""
    with ExitStack() as stack:

        def give(data: bytes) -> None:
            (tmp_path / "stdin").write_bytes(data)
            monkeypatch.setattr("sys.stdin", stack.enter_context((tmp_path / "stdin").open()))

        yield give


def target(text: str) -> str:
    return predictor()(text).text


BAD = b"abc\r\nx-y\n\ncab\nb\xffc\n \t\na\xc3\xa9d"
# The target of each line of BAD, from Python; empty for those that have none.
TARGETS = ["abc", None, None, "cab", None, None, "aéd"]


def expected() -> list[str]:
    return ["" if text is None else target(text) for text in TARGETS]


def test_a_bad_line_is_an_empty_line_with_a_note(
    model: str, lines_in: Callable[[bytes], None], capfd: pytest.CaptureFixture[str]
) -> None:
    lines_in(BAD)
    assert main(["predict", model]) == 1
    out, err = capfd.readouterr()
    assert out.split("\n") == [*expected(), ""]
    first, second, last = err.splitlines()
    assert first.startswith("note: line 2: unknown symbol 'x'")
    assert second == "note: line 5 is not UTF-8 text"
    assert last == "note: 2 of 7 lines could not be read"


def test_blank_lines_are_no_mistake(
    model: str, lines_in: Callable[[bytes], None], capfd: pytest.CaptureFixture[str]
) -> None:
    lines_in(b"\nabc\n\n")
    assert main(["predict", model]) == 0
    assert capfd.readouterr() == (f"\n{target('abc')}\n\n", "")
    assert main(["predict", model, "", "abc", "\n"]) == 0
    assert capfd.readouterr() == (f"\n{target('abc')}\n\n", "")


def test_a_byte_order_mark_and_windows_line_ends(
    model: str, lines_in: Callable[[bytes], None], capfd: pytest.CaptureFixture[str]
) -> None:
    lines_in(b"\xef\xbb\xbfabc\r\n\r\ncab\r\n")
    assert main(["predict", model, "--format", "tsv"]) == 0
    out, err = capfd.readouterr()
    rows = [line.split("\t") for line in out.removesuffix("\n").split("\n")]
    assert [row[0] for row in rows] == ["abc", "", "cab"] and err == ""
    assert [row[2] for row in rows] == [target("abc"), "", target("cab")]


def test_several_targets_a_line(
    model: str, lines_in: Callable[[bytes], None], capfd: pytest.CaptureFixture[str]
) -> None:
    lines_in(BAD)
    assert main(["predict", model, "--beam", "3", "--nbest", "2"]) == 1
    lines = capfd.readouterr().out.split("\n")
    assert len(lines) == 2 * len(TARGETS) + 1
    for text, best, second in zip(TARGETS, lines[::2], lines[1::2], strict=False):
        found = [] if text is None else predictor()(text, beam=3, nbest=2).alternatives
        assert [best, second] == [*(each.text for each in found), "", ""][:2]


def test_the_eleventh_note_is_a_count(
    model: str, lines_in: Callable[[bytes], None], capfd: pytest.CaptureFixture[str]
) -> None:
    lines_in(b"abc\n" + b"?\n" * 1200)
    assert main(["predict", model]) == 1
    out, err = capfd.readouterr()
    assert out == f"{target('abc')}\n" + "\n" * 1200
    *notes, last = err.splitlines()
    assert [note.split(":")[1] for note in notes] == [f" line {n}" for n in range(2, 12)]
    assert last == "note: 1,200 of 1,201 lines could not be read"


def test_strict_stops_at_the_first(
    model: str,
    tmp_path: Path,
    lines_in: Callable[[bytes], None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    for data, message in (
        (b"abc\nb c?\nabc\n", "line 2: unknown symbol '"),
        (b"abc\n\nabc\n", "line 2: the source is empty"),
        (b"abc\n\xff\n", "line 2 is not UTF-8 text"),
    ):
        lines_in(data)
        assert main(["predict", model, "--strict"]) == 2
        out, err = capfd.readouterr()
        assert out == f"{target('abc')}\n"
        assert err.startswith(f"fused-attn: error: {message}") and err.count("\n") == 1
        (tmp_path / "in").write_bytes(data)
        files = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
        assert main(["predict", model, "--strict", *files]) == 2
        assert f"error: {message}" in capfd.readouterr().err
        assert not (tmp_path / "out").exists()
    assert main(["predict", model, "abc", "?", "--strict"]) == 2
    assert "error: argument 2: unknown symbol '?'" in capfd.readouterr().err


def test_arguments(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    bad = os.fsdecode(b"a\xff")
    assert main(["predict", model, "abc", "A", bad, "cab\r\n"]) == 1
    out, err = capfd.readouterr()
    assert out.split("\n") == [target("abc"), "", "", target("cab"), ""]
    assert "argument 2: unknown symbol 'A'" in err and "argument 3 is not UTF-8 text" in err
    assert err.endswith("note: 2 of 4 arguments could not be read\n")


def test_from_file_to_file(model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_bytes(BAD)
    files = ["--input", str(source), "--output", str(output)]
    assert main(["predict", model, *files]) == 1
    out, err = capfd.readouterr()
    assert output.read_text(encoding="utf-8").split("\n") == [*expected(), ""]
    assert out == "" and err.count("\n") == 3
    assert err.endswith("note: 2 of 7 lines could not be read\n")
    source.write_bytes(b"abc\n\ncab\n")
    assert main(["predict", model, *files]) == 0
    assert capfd.readouterr() == ("", "")


def test_two_processes_count_together(model: str, tmp_path: Path) -> None:
    """Bad lines in both shares: the notes are printed once, in order, and both return 1."""
    source, output = tmp_path / "in.txt", tmp_path / "out.txt"
    lines = ["abc"] * 2500
    bad = [*range(3, 9), *range(1100, 1112)]
    for number in bad:
        lines[number - 1] = "?"
    source.write_text("\n".join(lines))
    script = tmp_path / "predict.py"
    script.write_text(
        "import sys, pathlib, os\nfrom fused_attn.cli import main\ncode = main(sys.argv[1:])\n"
        "pathlib.Path(sys.argv[-1] + os.environ['RANK']).write_text(str(code))\n"
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    files = ["--input", str(source), "--output", str(output)]
    done = subprocess.run(
        [sys.executable, *launcher, str(script), "predict", model, *files],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert [Path(f"{output}{rank}").read_text() for rank in (0, 1)] == ["1", "1"], done.stderr
    found = output.read_text(encoding="utf-8").split("\n")
    assert found == ["" if line == "?" else target("abc") for line in lines] + [""]
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert [int(note.split()[2].rstrip(":")) for note in notes[:-1]] == bad[:10]
    assert notes[-1] == "note: 18 of 2,500 lines could not be read"


def test_alignments_have_a_line_for_each_source(
    model: str,
    tmp_path: Path,
    lines_in: Callable[[bytes], None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name in ("a.pharaoh", "a.soft"):
        lines_in(BAD)
        assert main(["predict", model, "--alignments", str(tmp_path / name)]) == 1
        lines = (tmp_path / name).read_text().split("\n")
        assert [bool(line) for line in lines] == [*(bool(text) for text in TARGETS), False]
        assert main(["predict", model, "cab", "--alignments", str(tmp_path / name)]) == 0
        assert (tmp_path / name).read_text() == f"{lines[3]}\n"
    lines_in(BAD)
    capfd.readouterr()
    assert main(["predict", model, "--alignments", str(tmp_path / "a.png")]) == 1
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "shows the first" not in capfd.readouterr().err


def test_a_source_beyond_what_the_model_can_read(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fixed = str(checkpoint(tmp_path / "fixed", score="location", max_source=4))
    assert main(["predict", fixed, "abcd", "abcde"]) == 1
    out, err = capfd.readouterr()
    assert out.count("\n") == 2 and out.endswith("\n\n") and out.strip()
    assert "argument 2: the source has 5 symbols; the model reads at most 4" in err


@pytest.mark.parametrize("text", ["abc\n\n?\ncab\n", "abc\r\n\r\n?\r\ncab"])
def test_standard_input_without_a_file(
    model: str, text: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert main(["predict", model]) == 1
    assert capfd.readouterr().out.split("\n") == [target("abc"), "", "", target("cab"), ""]
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["predict", model]) == 0
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr("sys.stdin", None)
    assert main(["predict", model]) == 2
    assert capfd.readouterr().err.endswith("there is no TEXT, and standard input is closed\n")


def test_an_input_that_is_no_file(
    model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", str(tmp_path / "out")]
    for name, reason in ((tmp_path, "Is a directory"), (tmp_path / "no", "No such file")):
        assert main(["predict", model, "--input", str(name), *output]) == 2
        err = capfd.readouterr().err
        assert reason in err and str(name) in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_notes_never_go_to_standard_output(model: str) -> None:
    command = ["bash", "-c", '"$0" -m fused_attn predict "$1" abc ? 2>&-', sys.executable, model]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    assert (done.returncode, done.stdout) == (1, f"{target('abc')}\n\n")


def test_chat_goes_on(
    model: str, lines_in: Callable[[bytes], None], capfd: pytest.CaptureFixture[str]
) -> None:
    lines_in(b"abc\nx\n\n\xff\ncab\n")
    assert main(["chat", model]) == 0
    out, err = capfd.readouterr()
    assert out == f"{target('abc')}\n{target('cab')}\n"
    first, second = err.splitlines()
    assert first.startswith("note: this message: unknown symbol 'x'")
    assert second == "note: this message is not UTF-8 text"


def test_the_help_lists_the_exit_codes() -> None:
    text = make_parser().format_help()
    found = [line.split()[0] for line in text.partition("exit codes:\n")[2].splitlines()]
    assert found == ["0", "1", "2", "130", "141"]
