"""Input and output are UTF-8, whatever the locale and Python's settings say."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_models import checkpoint, predictor

from fused_attn.cli import main
from fused_attn.seq2seq.commands.streams import utf8_streams

# A locale in ASCII, and streams in an encoding that has only some of the characters.
PLAIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
SETTINGS = {"ascii": PLAIN, "latin-1": {**PLAIN, "PYTHONIOENCODING": "latin-1"}}
# Every target begins with words that are not ASCII, and one not Latin-1.
WORDS = ("fünf", "文字")
SOURCE = "aéb"


def run(*argv: str | bytes, setting: str, data: bytes = b"") -> tuple[int, str, str]:
    """Exit code, output and errors of the command in another locale."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG"))}
    done = subprocess.run(
        [sys.executable, "-m", "fused_attn", *argv],
        input=data,
        env={**environment, **SETTINGS[setting]},
        capture_output=True,
        check=False,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """In a directory with an accent."""
    return str(checkpoint(tmp_path_factory.mktemp("modèles") / "modèle", words=WORDS))


def target(**search: int) -> str:
    text = predictor(words=WORDS)(SOURCE, **search).text
    assert not text.isascii()
    return text


@pytest.mark.parametrize("setting", SETTINGS)
def test_predict(model: str, setting: str, tmp_path: Path) -> None:
    assert run("predict", model, SOURCE, setting=setting) == (0, f"{target()}\n", "")
    data = f"{SOURCE}\nü\n".encode() + b"\xff\n"
    code, out, err = run("predict", model, "--format", "json", setting=setting, data=data)
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and [record["source"] for record in records] == [SOURCE, "ü", "\ufffd"]
    assert records[0]["targets"][0]["target"] == target()
    assert "note: line 1: " not in err and "note: line 2: unknown symbol 'ü'" in err
    assert "line 3 is not UTF-8 text" in err
    source, output = tmp_path / "entrée", tmp_path / "sortie-é"
    source.write_bytes(data)
    code, out, err = run(
        "predict", model, "--input", str(source), "--output", str(output), setting=setting
    )
    assert (code, out) == (1, "") and output.read_bytes() == f"{target()}\n\n\n".encode()


@pytest.mark.parametrize("setting", ["ascii"])
def test_other_commands(model: str, setting: str, tmp_path: Path) -> None:
    page = tmp_path / "pagé.html"
    code, out, err = run("explain", model, SOURCE, "--output", str(page), setting=setting)
    best = target(beam=5, nbest=5)  # as `explain` searches
    assert (code, out, err) == (0, f"{page}: {SOURCE} -> {best}\n", "")
    assert best.split()[0] in page.read_text(encoding="utf-8")
    lines = tmp_path / "lignes-é.tsv"
    lines.write_text(f"{SOURCE}\t文字\n", encoding="utf-8")
    evaluate = ["evaluate", model, "--test", str(lines), "--samples", "1"]
    code, out, err = run(*evaluate, setting=setting)
    assert code == 0 and out.splitlines()[-1].startswith(SOURCE) and "文字" in out
    code, out, err = run(*evaluate, "--json", setting=setting)
    assert code == 0 and json.loads(out)["checkpoint"] == model
    code, out, err = run("chat", model, setting=setting, data=f"ü\n\xff\n{SOURCE}\n".encode())
    assert (code, out) == (0, f"{target()}\n") and "unknown symbol 'ü'" in err


def test_train_in_a_directory_with_an_accent(tmp_path: Path) -> None:
    lines, output = tmp_path / "données.tsv", tmp_path / "résultat"
    lines.write_text("".join(f"é{a} ü{b}\tfünf {a}\n" for a in "abcd" for b in "efgh"))
    options = ["--train", str(lines), "--dev", str(lines), "--hidden", "8", "--max-steps", "1"]
    code, out, err = run("train", "pairs", *options, "--output", str(output), setting="ascii")
    assert code == 0, err
    assert out.startswith(f"best checkpoint: {output}")
    assert "epoch 1: loss" in err and "epoch 1: loss" not in out
    code, out, err = run("predict", str(output), "éa üe", setting="ascii")
    assert (code, err) == (0, "")


@pytest.mark.parametrize("setting", ["ascii"])
def test_errors_with_accents(setting: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "modèle")
    code, out, err = run("predict", missing, "a", setting=setting)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"no checkpoint at {missing}" in err
    code, _, err = run("train", "pairs", "--train", missing, "--output", "x", setting=setting)
    assert code == 2 and err.count("\n") == 1 and missing in err
    code, _, err = run("predict", "g2p", "a", "--fórmat", "é", setting=setting)
    assert code == 2 and err.count("\n") == 1 and "--fórmat" in err
    code, _, err = run("train", "chat", "--corpus", "é", "--output", "x", setting=setting)
    assert code == 2 and err.endswith("got 'é'\n")
    unreadable = os.fsencode(tmp_path) + b"/m\xff"
    code, _, err = run("predict", unreadable, "a", setting=setting)
    assert code == 2 and err.count("\n") == 1 and "m\\udcff" in err


def test_a_name_that_the_locale_lacks(tmp_path: Path) -> None:
    """A checkpoint may have stored it in another locale."""
    lines = tmp_path / "config.yaml"
    lines.write_text("task: pairs\ntrain: données.tsv\noutput: x\n", encoding="utf-8")
    code, out, err = run("train", str(lines), setting="ascii")
    assert (code, out, err.count("\n")) == (2, "", 1) and "données.tsv" in err


def test_streams_are_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = (io.TextIOWrapper(io.BytesIO(), "latin-1", "strict") for _ in range(2))
    plain = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    monkeypatch.setattr("sys.stdin", plain)
    out.write("é")
    with utf8_streams():
        assert out.encoding == "utf-8"
        print("文 \udcc3\udca9 \udcff \ud800")
    assert (out.encoding, out.errors) == ("latin-1", "strict")
    out.write("é")
    out.flush()
    buffer = out.buffer
    assert isinstance(buffer, io.BytesIO)
    expected = b"\xe9" + "文 é \\udcff \\ud800\n".encode() + b"\xe9"
    assert buffer.getvalue() == expected
    monkeypatch.setattr("sys.stdout", None)
    with utf8_streams():
        pass


def test_main_writes_to_a_stringio(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = io.StringIO()
    monkeypatch.setattr("sys.stdout", printed)
    assert main(["predict", model, SOURCE]) == 0
    assert printed.getvalue() == f"{target()}\n"
