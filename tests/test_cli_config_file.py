"""A file of options is read at once or refused with one line, whatever YAML it has."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fused_attn.cli import main
from fused_attn.seq2seq.commands.config_file import read_config

BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)
# What is in the file, and a part of the error.
REFUSED: dict[str, tuple[str | bytes, str]] = {
    "recursive map": ("task: g2p\nlr: &a {b: *a}\n", "line 2: anchors and aliases are not allowed"),
    "recursive list": ("task: g2p\nlr: &a [*a]\n", "line 2: lr must have one value"),
    "alias": ("task: &t g2p\ntrain: *t\n", "anchors and aliases are not allowed"),
    "merge": ("task: g2p\n<<: {lr: 1}\n", "line 2: '<<' is not the name of an option"),
    "bomb": (f"task: g2p\n{BOMB}", "line 2: a0 must have one value"),
    "bomb of maps": (f"task: g2p\n{BOMB}".replace("[", "{").replace("]", "}"), "not allowed"),
    "list": ("task: g2p\nlr: [1, 2]\n", "line 2: lr must have one value"),
    "5,000 digits": (f"task: g2p\nepochs: {'9' * 5000}\n", "epochs has a value that no option"),
    "400 digits": (f"task: g2p\nepochs: {'9' * 400}\n", "epochs"),
    "NUL": ('task: g2p\nlexicon: "a\\0b"\n', "line 2: lexicon has a value that no option takes"),
    "surrogate": ('task: g2p\nlexicon: "\\ud800"\n', "lexicon has a value that no option takes"),
    "deep lists": ("[" * 20_000, "expected a line 'task: NAME'"),
    "deep maps": ("{a: " * 10_000, "sections are nested more than 4 deep"),
    "deep blocks": ("".join(f"{' ' * n}a:\n" for n in range(300)), "nested more than 4 deep"),
    "twice": ("task: g2p\nlr: 1\nlr: 2\n", "line 3: lr is given twice"),
    "twice in two spellings": ("task: g2p\nbatch_size: 1\nbatch-size: 2\n", "given twice"),
    "twice in sections": ("task: g2p\na: {lr: 1}\nb: {lr: 2}\n", "line 3: lr is given twice"),
    "two tasks": ("task: g2p\ntask: scan\n", "line 2: task is given twice"),
    "no mapping": ("- task\n- g2p\n", "expected a line 'task: NAME'"),
    "a word": ("g2p\n", "expected a line 'task: NAME'"),
    "nothing": ("", "expected a line 'task: NAME'"),
    "no task": ("lr: 1\n", "expected a line 'task: NAME'"),
    "null": ("task:\n", "expected a line 'task: NAME'"),
    "binary": ("task: g2p\nlexicon: !!binary aGk=\n", "tags such as tag:yaml.org,2002:binary"),
    "python": ("task: g2p\nlr: !!python/object/apply:os.getcwd {}\n", "tags such as"),
    "two documents": ("task: g2p\n---\nlr: 1\n", "line 2: expected one document"),
    "number as a name": ("task: g2p\n1: 2\n", "line 2: '1' is not the name of an option"),
    "list as a name": ("task: g2p\n? [a]\n: b\n", "expected a line"),
    "map as a name": ("task: g2p\n{a: b}: c\n", "a section is not the name of an option"),
    "equals sign": ("task: g2p\nlr=3: 4\n", "'lr=3' is not the name of an option"),
    "not YAML": ("task: g2p\n\tlr: 1\n", "cannot start any token"),
    "UTF-16": ("task: g2p\n".encode("utf-16"), "can't decode byte"),
    "control characters": ("task: g2p\nlr: \x01\n", "special characters are not allowed"),
    "too large": ("task: g2p\n" + "# long\n" * 20_000, "is too large"),
    "impossible date": ("task: g2p\nlexicon: 2024-13-45\n", "cannot read 2024-13-45: No such file"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_is_refused_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    text, part = REFUSED[kind]
    file = tmp_path / "options.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    started = time.monotonic()
    try:
        code: object = main(["train", str(file), "--output", str(tmp_path / "run")])
    except SystemExit as exit:  # from the parser
        code = exit.code
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and part in error, error
    assert time.monotonic() - started < 20  # a bomb took minutes
    assert not (tmp_path / "run").exists()


def test_values_are_read_as_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_bytes(
        b"\xef\xbb\xbftask: translate\n"
        b"recipe: {lr: 2e-3, epochs: 3, bucket: false, seed: 0017}\n"
        b"model:\n  more:\n    input_feeding: yes\n    attn-dim: null\n  tie: ~\n"
        b"train: 2024-02-30\ndev: 'no'\ntest: \"true\"\noutput: a: b\n".replace(b"a: b", b"'a: b'")
    )
    assert read_config(str(file)) == [
        *("translate", "--lr=2e-3", "--epochs=3", "--no-bucket", "--seed=0017"),
        *("--input-feeding", "--train=2024-02-30", "--dev=no", "--test=true", "--output=a: b"),
    ]


def test_a_bad_value_names_the_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("task: pairs\nepochs: many\n")
    with pytest.raises(SystemExit) as caught:
        main(["train", str(path), "--output", str(tmp_path / "run")])
    assert caught.value.code == 2
    assert f"{path}: argument --epochs: invalid int value: 'many'" in capfd.readouterr().err
    path.write_text("task: pairs\n")
    with pytest.raises(SystemExit):
        main(["train", str(path), "--epochs", "many"])
    assert str(path) not in capfd.readouterr().err, "that one was on the command line"
