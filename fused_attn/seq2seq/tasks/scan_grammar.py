"""SCAN (Lake & Baroni 2018, "Generalization without Systematicity"): commands and their actions.

All 20,910 commands of the phrase grammar with their actions, and the splits of the paper:

    C -> S and S | S after S | S          S -> V twice | V thrice | V
    V -> X opposite W | X around W | D | U         D -> X W
    X -> U | turn        U -> walk | look | run | jump        W -> left | right
"""

from __future__ import annotations

from collections.abc import Iterator

Pair = tuple[tuple[str, ...], tuple[str, ...]]

VERBS = ("walk", "look", "run", "jump")
SIDES = ("left", "right")
SPLITS = ("simple", "length", "turn-left", "jump")

# The split "length" trains on commands with at most this many actions.
SHORT_ACTIONS = 22
# In the splits "turn-left" and "jump" there is one copy of the bare command for every 9 other
# training pairs, so it makes up a tenth of the training set.
_COPIES = 9


def _phrases() -> Iterator[Pair]:
    """V: a verb, optionally with a direction."""
    for verb in VERBS:
        yield (verb,), (f"I_{verb.upper()}",)
    for verb in ("turn", *VERBS):
        act = () if verb == "turn" else (f"I_{verb.upper()}",)
        for side in SIDES:
            turn = (f"I_TURN_{side.upper()}",)
            yield (verb, side), turn + act
            yield (verb, "opposite", side), turn + turn + act
            yield (verb, "around", side), (turn + act) * 4


def _sentences() -> Iterator[Pair]:
    """S: a phrase, once, twice or thrice."""
    for words, actions in _phrases():
        yield words, actions
        yield (*words, "twice"), actions * 2
        yield (*words, "thrice"), actions * 3


def commands() -> list[Pair]:
    """Return every command with its actions, sorted."""
    sentences = list(_sentences())
    found = list(sentences)
    for first, does_first in sentences:
        for second, does_second in sentences:
            found.append(((*first, "and", *second), does_first + does_second))
            found.append(((*first, "after", *second), does_second + does_first))
    return sorted(found)


def split_commands(split: str) -> tuple[list[Pair], list[Pair]]:
    """Return the training and the test pairs of a systematic split.

    "length" trains on commands with at most 22 actions and tests on the longer ones. "turn-left"
    and "jump" train on the bare phrase (repeated) and all commands without it, and test on the
    other commands with the phrase. Raises ValueError for another split.
    """
    every = commands()
    if split == "length":
        short = [pair for pair in every if len(pair[1]) <= SHORT_ACTIONS]
        return short, [pair for pair in every if len(pair[1]) > SHORT_ACTIONS]
    if split not in ("turn-left", "jump"):
        raise ValueError(f"split must be length, turn-left or jump, got {split!r}")
    phrase = tuple(split.split("-"))
    alone = next(pair for pair in every if pair[0] == phrase)
    others = [pair for pair in every if not _holds(pair[0], phrase)]
    test = [pair for pair in every if _holds(pair[0], phrase) and pair != alone]
    return others + [alone] * (len(others) // _COPIES), test


def _holds(words: tuple[str, ...], phrase: tuple[str, ...]) -> bool:
    size = len(phrase)
    return any(words[at : at + size] == phrase for at in range(len(words) - size + 1))
