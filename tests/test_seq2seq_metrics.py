"""Error rates on examples computed by hand."""

from __future__ import annotations

import pytest

from fused_attn.seq2seq.metrics import edit_distance, error_rates


@pytest.mark.parametrize(
    ("hypothesis", "reference", "distance"),
    [
        ("", "", 0),
        ("", "abc", 3),
        ("abc", "", 3),
        ("abc", "abc", 0),
        ("abc", "abd", 1),  # substitution
        ("abc", "ac", 1),  # deletion
        ("ac", "abc", 1),  # insertion
        ("kitten", "sitting", 3),
        ("ab", "ba", 2),  # a swap is two edits
    ],
)
def test_edit_distance(hypothesis: str, reference: str, distance: int) -> None:
    assert edit_distance(hypothesis, reference) == distance


def test_rates_are_sums_over_sums() -> None:
    rates = error_rates([("abc", ["abc"]), ("x", ["a"]), ("abcd", ["abxx"])])
    assert (rates.edits, rates.reference_symbols) == (3, 8)
    assert rates.symbol_error_rate == 3 / 8
    assert (rates.wrong, rates.count) == (2, 3)
    assert rates.sequence_error_rate == 2 / 3


def test_the_nearest_alternative_counts_and_gives_the_length() -> None:
    rates = error_rates([("abcd", ["xyz", "abcde", "ab"])])
    assert (rates.edits, rates.reference_symbols, rates.wrong) == (1, 5, 1)
    assert error_rates([("ab", ["xyz", "ab"])]).wrong == 0


def test_nothing_to_judge() -> None:
    with pytest.raises(ValueError, match="there are no reference symbols"):
        error_rates([])
