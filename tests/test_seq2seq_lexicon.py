"""Training words besides those of the dictionary, from a lexicon file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fused_attn.cli import main
from fused_attn.seq2seq.checkpoints import files
from fused_attn.seq2seq.data.pairs import Data, Pair
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.tasks import cmudict
from fused_attn.seq2seq.tasks.g2p import G2P, G2PConfig

TINY = ["--hidden", "8", "--embedding", "8", "--max-steps", "2"]


@pytest.fixture(autouse=True)
def dictionary(monkeypatch: pytest.MonkeyPatch) -> cmudict.Lexicon:
    """A dictionary of a few words."""
    whole = cmudict.load_dictionary()
    few = {word: whole[word] for word in cmudict.by_hash(whole)[:600]}
    monkeypatch.setattr(cmudict, "load_dictionary", lambda: few)
    return few


def load(lexicon: Path | None, test_words: tuple[str, ...] | None = None) -> Data:
    return G2P(G2PConfig(test_words, lexicon=None if lexicon is None else str(lexicon))).load()


def new_pairs(data: Data) -> list[Pair]:
    """The training pairs that come from the lexicon."""
    before = list(load(None).train)
    found = list(data.train)
    assert found[: len(before)] == before
    return found[len(before) :]


def test_new_words_are_trained_on(tmp_path: Path) -> None:
    """In all usual formats: tabs or blanks, stress, variants, comments, capitals."""
    file = tmp_path / "own.dict"
    file.write_text(
        "zorble\tZ AO R B AH L\n"
        "# names\n"
        "\n"
        "Quux  K W AH1 K S # invented\r\n"
        "quux(2)  K UW0 K S\n"
        "quux  K W AH K S\n"
    )
    data = load(file)
    assert new_pairs(data) == [
        Pair(tuple("zorble"), ("Z", "AO", "R", "B", "AH", "L")),
        Pair(tuple("quux"), ("K", "W", "AH", "K", "S")),
        Pair(tuple("quux"), ("K", "UW", "K", "S")),
    ]
    assert data.notes == ()
    assert data.fingerprint != load(None).fingerprint
    without = load(None)
    assert (data.source.symbols, data.target.symbols) == (
        without.source.symbols,
        without.target.symbols,
    )


def test_what_is_judged_is_not_trained_on(tmp_path: Path) -> None:
    """Words of the development and test sets are skipped, whether in the dictionary or not."""
    before = load(None)
    judged = ["".join(item.source) for item in (*before.dev[:2], *before.test[:3])]
    known = "".join(next(iter(before.train)).source)
    file = tmp_path / "words.tsv"
    file.write_text("".join(f"{word}\tK AE T\n" for word in [*judged, known, "zorble"]))
    data = load(file)
    cat = ("K", "AE", "T")
    assert new_pairs(data) == [Pair(tuple(known), cat), Pair(tuple("zorble"), cat)]
    assert data.notes == (f"{file}: skipped 5 words of the development and test sets",)
    assert (data.dev, data.test) == (before.dev, before.test)
    listed = load(file, test_words=("zorble", judged[-1]))
    assert Pair(tuple("zorble"), cat) not in list(listed.train)


def test_a_pair_of_the_dictionary_counts_once(tmp_path: Path, dictionary: cmudict.Lexicon) -> None:
    file = tmp_path / "all.dict"
    lines = [f"{w} {' '.join(v)}\n" for w, variants in dictionary.items() for v in variants]
    file.write_text("".join(lines))
    assert new_pairs(load(file)) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"cat K AE T\ncaf\xc3\xa9 K AE F EY\n", "line 2: the word 'café' has characters other"),
        (b"cat K AE T\n\ncat K A T\n", "line 3: unknown phone 'A'; known phones: AA AE"),
        (b"cat\n", "line 1: the word 'cat' has no phones"),
        (b"cat K AE T\nh\xff K\n", "line 2: not UTF-8 text (byte 2)"),
        (b"# nothing\n\n", "has no words"),
        (b"", "has no words"),
    ],
)  # fmt: skip
def test_what_cannot_be_used(tmp_path: Path, text: bytes, message: str) -> None:
    file = tmp_path / "bad.dict"
    file.write_bytes(text)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        load(file)
    assert str(caught.value).startswith(str(file))


def test_from_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A run resumes only with its lexicon; an exported model does not need it."""
    words = tmp_path / "words.txt"
    words.write_text("zorble\nquuxian\n")
    teacher, run = tmp_path / "teacher", tmp_path / "run"
    assert main(["train", "g2p", "--output", str(teacher), *TINY]) == 0
    phones = tmp_path / "phones.txt"
    assert main(["predict", str(teacher), "--input", str(words), "--output", str(phones),
                 "--min-length", "1"]) == 0  # fmt: skip
    both = zip(words.read_text().splitlines(), phones.read_text().splitlines(), strict=True)
    file = tmp_path / "lexicon.tsv"
    file.write_text("".join(f"{word}\t{phones}\n" for word, phones in both))
    train = ["train", "g2p", "--output", str(run)]
    options = ["--lexicon", str(file), "--start-from", str(teacher), *TINY]
    assert main([*train, *options]) == 0
    assert main([*train, "--resume"]) == 0
    text = file.read_text()
    file.write_text(text.splitlines(keepends=True)[0])
    assert main([*train, "--resume"]) == 2
    assert "the training pairs have changed" in capfd.readouterr().err
    file.unlink()
    assert main([*train, "--resume"]) == 2
    assert f"there is no file {file}; --lexicon FILE names" in capfd.readouterr().err
    exported = tmp_path / "model"
    assert main(["export", str(run), "--output", str(exported)]) == 0
    meta = json.loads((exported / files.METADATA).read_text())
    assert meta["task"]["lexicon"] is None
    assert str(tmp_path) not in json.dumps(meta)
    assert main(["evaluate", str(exported), "--limit", "5"]) == 0
    again = ["train", "g2p", "--output", str(tmp_path / "on"), "--start-from", str(exported)]
    assert main([*again, "--max-steps", "1"]) == 0


def test_what_a_model_has_seen_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A note counts the test words that are in the training or the development set."""
    file = tmp_path / "own.dict"
    data = load(None)
    trained, dev, test = (
        ["".join(item.source) for item in items] for items in (data.train, data.dev, data.test)
    )
    file.write_text(f"{trained[0]} K AE T\n")
    run = tmp_path / "run"
    assert main(["train", "g2p", "--output", str(run), "--lexicon", str(file), *TINY]) == 0
    words = tmp_path / "words.txt"
    capfd.readouterr()
    notes = []
    for listed in ([trained[0], *dev[:2], *test[:3]], test[:3]):
        words.write_text("\n".join(listed))
        assert main(["evaluate", str(run), "--test", str(words)]) == 0
        notes.append(capfd.readouterr().err.splitlines())
    assert notes == [
        [
            "note: 1 of these words is in the training set of the model",
            "note: 2 of these words are in the development set of the model",
        ],
        [],
    ]
