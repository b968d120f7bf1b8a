"""Files of pairs: columns after the second, names of files, files that are not regular."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from fused_attn.cli import main
from fused_attn.seq2seq.data.pair_files import PairFile, Reader
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.tasks.chat import Chat, ChatConfig
from fused_attn.seq2seq.tasks.g2p import G2P, G2PConfig
from fused_attn.seq2seq.tasks.scan import Scan, ScanConfig
from fused_attn.seq2seq.tasks.text import Pairs, PairsConfig

TINY = ["--hidden", "8", "--embedding", "8", "--max-steps", "2"]


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


# --- the third column


def attributed(count: int = 12) -> str:
    return "".join(f"w{i} x\tv{i} y\tCC-BY 2.0 (France) #{i}\n" for i in range(count))


def test_an_attribution_is_ignored_with_one_note(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = f"plain\tline\n{attributed()}other\tline\t\t\n"
    path, run = write(tmp_path / "a.tsv", text), tmp_path / "run"
    train = f"train pairs --train {path} --output {run}".split()
    assert main([*train, *TINY]) == 0
    notes = [line for line in capfd.readouterr().err.splitlines() if "column" in line]
    assert notes == [
        f"note: {path}: ignored what follows the second column in 12 lines, first "
        "'CC-BY 2.0 (France) #0'; --guided reads links from the third column"
    ]
    assert all(pair.links == () for pair in Pairs(PairsConfig(train=path)).load().train)
    assert main(["evaluate", str(run), "--test", path]) == 0
    error = capfd.readouterr().err
    assert "ignored what follows the second column in 12 lines" in error
    assert "--guided" not in error


BAD_LINKS = {
    "no link": ("CC-BY 2.0", "'CC-BY' is not a link: expected 0-1, or 0?1 for a possible link"),
    "out of range": ("0-0 0-7", "the link 0-7 is out of range for 2 source and 1 target symbols"),
    "huge": (f"0-{'9' * 5000}", "is not a link: expected 0-1"),
    "a fourth": ("0-0\tx", "expected a source, a target and links separated by tabs, got 4 colu"),
}


@pytest.mark.parametrize("kind", BAD_LINKS)
def test_with_guided_alignment_bad_links_are_named(
    tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    links, reason = BAD_LINKS[kind]
    path, run = write(tmp_path / "a.tsv", f"a b\tA\t0-0\na b\tA\t{links}\n"), tmp_path / "run"
    train = f"train pairs --train {path} --output {run} --guided 0.5".split()
    assert main([*train, *TINY]) == 2
    error = capfd.readouterr().err
    assert f"{path}, line 2: " in error and reason in error and error.count("\n") == 1
    assert len(error) < 600
    assert "without --guided only the first two columns are read" in error
    assert "--skip-bad skips such lines" in error
    assert main([*train, *TINY, "--skip-bad"]) == 0
    assert f"{path}: skipped 1 bad line" in capfd.readouterr().err


def test_links_are_read_only_when_they_are_wanted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "a b\tA\t0-0 1-0\nc\tC\nd\tD\t\n")
    task = Pairs(PairsConfig(train=path, dev=path))
    assert [pair.links for pair in task.load().train] == [(), (), ()]
    data = task.load(links=True)
    assert [pair.links for pair in data.train] == [(0, 0, 1, 0), (), ()]
    assert not data.notes
    three = [write(tmp_path / n, t) for n, t in (("s", "a b\n"), ("t", "A\n"), ("l", "0-0\n"))]
    (pair,) = PairFile(",".join(three), Reader(links=True))
    assert pair.links == (0, 0)


def test_a_line_with_one_column_names_what_came(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, run = write(tmp_path / "a.tsv", f"a\tA\n{'no tab ' * 40}\n"), tmp_path / "run"
    assert main(["train", "pairs", "--train", path, "--output", str(run), *TINY]) == 2
    error = capfd.readouterr().err
    assert (
        f"{path}, line 2: expected a source and a target separated by a tab, got 1 column, 'no tab"
    ) in error
    assert error.endswith("...'; --skip-bad skips such lines\n") and len(error) < 400
    # Evaluation has no such option.
    with pytest.raises(InputError) as caught:
        Pairs(PairsConfig()).listed(Path(path))
    assert "skip_bad" not in str(caught.value) and "line 2" in str(caught.value)


# --- files that are not regular, and names of files


@pytest.fixture
def fifo(tmp_path: Path) -> str:
    os.mkfifo(tmp_path / "fifo")
    return str(tmp_path / "fifo")


def test_a_fifo_is_refused_where_it_would_be_read_again(fifo: str, tmp_path: Path) -> None:
    """Without this, opening it waits for ever."""
    good = write(tmp_path / "a.tsv", "a\tA\n")
    tasks = [Pairs(PairsConfig(train=good, **{name: fifo})) for name in ("dev", "test")]
    tasks += [Pairs(PairsConfig(train=path)) for path in (fifo, f"{good},{fifo}")]
    for task in (*tasks, Chat(ChatConfig(dialogs=fifo)), G2P(G2PConfig(lexicon=fifo))):
        with pytest.raises(InputError, match=f"cannot read {fifo}: expected a regular file.* FIFO"):
            task.load()
    with pytest.raises(InputError, match=r"/dev/zero: expected a regular file.*got a device"):
        Pairs(PairsConfig(train="/dev/zero")).load()


@pytest.mark.parametrize(
    ("task", "text"),
    [
        (Pairs(PairsConfig()), "a\tA\n"),
        (G2P(G2PConfig()), "hello HH AH L OW\n"),
        (G2P(G2PConfig()), "hello\n"),
        (Scan(ScanConfig()), "jump twice\n"),
    ],
)
def test_a_test_set_may_come_from_a_fifo(fifo: str, task: Pairs | G2P | Scan, text: str) -> None:
    """As from ``evaluate --test <(...)``: it is read once."""
    writer = threading.Thread(target=Path(fifo).write_text, args=(text,), daemon=True)
    writer.start()
    items, _ = task.listed(Path(fifo))
    writer.join()
    assert len(items) == 1


def test_a_fifo_that_a_model_names_does_not_stop_an_evaluation(
    tmp_path: Path, fifo: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its training file is only asked whether it has the test sources."""
    path, run = write(tmp_path / "a.tsv", "a\tA\nb\tB\n"), tmp_path / "run"
    train = ["train", "pairs", "--train", path, "--dev", path, "--output", str(run)]
    assert main([*train, *TINY]) == 0
    os.rename(path, tmp_path / "moved.tsv")
    os.rename(fifo, path)
    assert main(["evaluate", str(run), "--test", str(tmp_path / "moved.tsv")]) == 0
    error = capfd.readouterr().err
    assert f"cannot check whether the model was trained on these lines: cannot read {path}" in error
    assert main(["train", "pairs", "--output", str(run), "--resume"]) == 2
    assert f"cannot read {path}: expected a regular file" in capfd.readouterr().err


NAMES = {
    "empty": ("", "cannot read '': the name of the file is empty"),
    "an empty part": ("{good},", "the name of the file is empty"),
    "NUL": ("a\0b", r"cannot read 'a\\x00b': not a valid file name"),
    "a surrogate": ("a\ud800", "not a valid file name"),
    "a directory": ("{here}", "cannot read {here}: Is a directory"),
    "too long": ("x" * 5000, "File name too long"),
    "one of two is missing": ("{good},{here}/none", "cannot read {here}/none: No such file"),
    "both are missing": ("{here}/no,{here}/none", "cannot read {here}/no: No such file"),
    "four": ("{good},{good},{good},{good}", "in files of their own, got 4 files"),
}


@pytest.mark.parametrize("kind", NAMES)
def test_bad_names_of_files(tmp_path: Path, kind: str) -> None:
    good = write(tmp_path / "a.tsv", "a\tA\n")
    name, reason = (text.replace("{here}", str(tmp_path)) for text in NAMES[kind])
    for config in (
        PairsConfig(train=name.replace("{good}", good)),
        PairsConfig(train=good, dev=name.replace("{good}", good)),
    ):
        with pytest.raises(InputError, match=reason):
            Pairs(config).load()
    if kind in ("empty", "NUL", "a surrogate", "a directory", "too long"):
        for task in (Chat(ChatConfig(dialogs=name)), G2P(G2PConfig(lexicon=name))):
            with pytest.raises(InputError, match="cannot read"):
                task.load()


def test_a_name_with_a_comma_is_one_file_if_it_exists(tmp_path: Path) -> None:
    path = write(tmp_path / "a,b.tsv", "a\tA\n")
    assert list(Pairs(PairsConfig(train=path)).load().train) == [(("a",), ("A",), ())]
    with pytest.raises(InputError, match=f"cannot read {tmp_path}/a: No such file"):
        Pairs(PairsConfig(train=f"{tmp_path}/a,c.tsv")).load()
