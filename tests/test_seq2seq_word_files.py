"""Files of test words: with their pronunciations, which are the references, or without."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fused_attn import seq2seq
from fused_attn.cli import main
from fused_attn.seq2seq.data.pairs import Item
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.tasks import cmudict
from fused_attn.seq2seq.tasks.g2p import G2P, G2PConfig
from fused_attn.seq2seq.tasks.scan import Scan

ZORBLE = ("Z", "AO", "R", "B", "AH", "L")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "test.txt"


def listed(file: Path, text: str) -> list[Item]:
    file.write_text(text, encoding="utf-8")
    return G2P(G2PConfig()).listed(file)[0]


@pytest.mark.parametrize(
    "text",
    [
        "zorble\tZ AO R B AH L\nhello\tHH AH L OW\n",
        "zorble Z AO R B AH L\r\nhello  HH AH0 L OW1\r\n",
        "# a comment\n\nZORBLE  Z AO1 R B AH0 L # made up\nHello(2) HH AH L OW\n",
        ";;; CMUdict\nHELLO  HH AH0 L OW1\nZORBLE  Z AO1 R B AH0 L",
        "\ufeffzorble\tZ\tAO\tR\tB\tAH\tL\rhello\tHH\tAH\tL\tOW",
    ],
)
def test_pronunciations_are_the_references(file: Path, text: str) -> None:
    """Also of a word that the dictionary does not have, and in place of what it has."""
    assert listed(file, text) == [
        Item(tuple("hello"), (("HH", "AH", "L", "OW"),)),
        Item(tuple("zorble"), (ZORBLE,)),
    ]


def test_pronunciations_of_a_word_are_alternatives(file: Path) -> None:
    (item,) = listed(file, "read R EH D\nread(2) R IY D\nRead\tR EH1 D\n")
    assert item == Item(tuple("read"), (("R", "EH", "D"), ("R", "IY", "D")))


@pytest.mark.parametrize(
    "text",
    ["hello\nworld\n", "hello world", "World\n# zorble\nhello # greeting\n", "hello\tworld\n"],
)
def test_words_alone_are_looked_up(file: Path, text: str) -> None:
    dictionary = cmudict.load_dictionary()
    assert listed(file, text) == [Item(tuple(w), dictionary[w]) for w in ("hello", "world")]


def test_words_that_look_like_phones_are_words(file: Path) -> None:
    assert len(listed(file, "he er ah\n")) == 3
    assert [item.source for item in listed(file, "IT\nB\nIS\n")] == [("b",), ("i", "s"), ("i", "t")]


BAD = {
    "a word without phones": (
        "cat K AE T\ndog\n",
        "line 2: expected a word and its phones, as in line 1 ('cat K AE T'), got 'dog', which has "
        "words only",
    ),
    "phones among words": (
        "cat\n\ndog D AO G\n",
        "line 3: expected words only, as in line 1 ('cat'), got 'dog D AO G', which has a word and "
        "its phones",
    ),
    "several words": ("cat K AE T\nthe dog\n", "line 2: unknown phone 'dog'; known phones: AA"),
    "another alphabet": ("cat\tkæt\n", "line 1: unknown phone 'kæt'; known phones: AA AE"),
    "one unknown": (
        "cat\tK AE T\ndog\tD XX G\n",
        "line 2: unknown phone 'XX'; known phones: AA AE",
    ),
    "one unknown first": ("dog\tD XX G\n", "line 1: unknown phone 'XX'; known phones: AA AE"),
    "lower case": ("cat\tk ae t\n", "line 1: unknown phone 'k'; known phones: AA AE"),
    "a mistake": ("cat K AE T\nsub\tS UB\n", "line 2: unknown phone 'UB'; known phones: AA"),
    "no word": ("cat K AE T\ncafé K AE F EY\n", "line 2: the word 'café' has characters other"),
    "nothing": ("# nothing\n\n", " has no words"),
    "empty": ("", " has no words"),
    "unknown words": ("zorble\n", "is in the dictionary; with a word and its phones on each line"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_used_is_named(file: Path, kind: str) -> None:
    text, reason = BAD[kind]
    with pytest.raises(InputError, match=re.escape(reason)) as caught:
        listed(file, text)
    assert str(file) in str(caught.value)


def test_evaluate(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The phones are references, not words; a model that is right has no errors."""
    assert main(["predict", "g2p", "hello", "world", "zorble"]) == 0
    found = capfd.readouterr().out.splitlines()
    words = ("hello", "world", "zorble")
    file.write_text("".join(f"{w}\t{p}\n" for w, p in zip(words, found, strict=True)))
    assert main(["evaluate", "g2p", "--test", str(file), "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert (report["count"], report["WER"], report["PER"]) == (3, 0, 0)
    assert report["symbols"] == sum(len(phones.split()) for phones in found)
    file.write_text(f"zorble\t{found[0]}\nworld {found[1]}\n")
    assert seq2seq.evaluate(seq2seq.load("g2p"), file)["WER"] == 0.5
    file.write_text(f"{file.read_text()}hello\n")
    assert main(["evaluate", "g2p", "--test", str(file)]) == 2
    assert f"{file}, line 3: expected a word and its phones" in capfd.readouterr().err


def test_training_holds_out_the_words_of_the_same_file(file: Path) -> None:
    file.write_text("zorble\tZ AO R\nhello\tHH AH L OW\nworld W ER L D\n")
    assert G2P.test_option(file) == {"test_words": ("hello", "world", "zorble")}
    data = G2P(G2PConfig(**G2P.test_option(file), limit_words=500)).load()
    assert {item.source for item in data.test} == {tuple("hello"), tuple("world")}
    assert not {tuple("hello"), tuple("world")} & {pair.source for pair in data.train}
    words = file.with_name("words.txt")
    words.write_text("world hello\nzorble\n")
    assert G2P.test_option(words) == G2P.test_option(file)


def test_test_words_that_the_dictionary_lacks_are_named() -> None:
    with pytest.raises(InputError, match=r"in the dictionary: 4 words \(a, b, c, \.\.\.\)"):
        cmudict.split_words({"x": (("EH",),)}, ["c", "b", "a", "d"])


def test_commands_that_are_not_of_scan_are_named(file: Path) -> None:
    file.write_text("jump twice\n\njump sideways\n")
    for read in (Scan.test_option, Scan(Scan.kind()).listed):
        with pytest.raises(InputError) as caught:
            read(file)
        assert str(caught.value) == f"{file}, line 3: 'jump sideways' is not a command of SCAN"
    file.write_text("\n")
    with pytest.raises(InputError, match=f"{file} has no commands"):
        Scan(Scan.kind()).listed(file)
