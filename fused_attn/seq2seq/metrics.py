"""Error rates against references with alternatives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Link = tuple[int, int]  # positions in source and target, from 0

# Measures that grow with quality; all others fall.
_HIGHER_IS_BETTER = ("BLEU", "chrF")
PERPLEXITY = "perplexity"


def cost(name: str, value: float) -> float:
    """A measure as a number that is lower for a better model."""
    return -value if name in _HIGHER_IS_BETTER else value


def shown(name: str, value: float) -> str:
    """A measure for people."""
    if name == PERPLEXITY:
        return f"{value:.2f}"
    return f"{100 * value:.2f}" + ("" if name in _HIGHER_IS_BETTER else " %")


def edit_distance(hypothesis: Sequence[str], reference: Sequence[str]) -> int:
    """Return the least number of insertions, deletions and substitutions between the two."""
    row = list(range(len(reference) + 1))
    for i, symbol in enumerate(hypothesis, start=1):
        diagonal, row[0] = row[0], i
        for j, expected in enumerate(reference, start=1):
            substituted = diagonal + (symbol != expected)
            diagonal = row[j]
            row[j] = min(substituted, row[j] + 1, row[j - 1] + 1)
    return row[-1]


@dataclass(frozen=True)
class ErrorRates:
    """Sums over the judged sequences."""

    edits: int  # to the nearest alternative of each
    reference_symbols: int  # in those alternatives
    wrong: int  # sequences that equal none of their alternatives
    count: int

    @property
    def symbol_error_rate(self) -> float:
        """Edits per reference symbol: the phone error rate of pronunciations."""
        return self.edits / self.reference_symbols

    @property
    def sequence_error_rate(self) -> float:
        """Share of sequences with any error: the word error rate of pronunciations."""
        return self.wrong / self.count


def error_rates(
    judged: Iterable[tuple[Sequence[str], Sequence[Sequence[str]]]],
) -> ErrorRates:
    """Judge pairs of a hypothesis and its alternative references, of which the nearest counts.

    Of equally near alternatives the first counts. Raises ValueError if there is nothing to judge.
    """
    edits = symbols = wrong = count = 0
    for hypothesis, alternatives in judged:
        distances = [edit_distance(hypothesis, reference) for reference in alternatives]
        nearest = min(distances)
        edits += nearest
        symbols += len(alternatives[distances.index(nearest)])
        wrong += nearest > 0
        count += 1
    if not symbols:
        raise ValueError("there is nothing to judge")
    return ErrorRates(edits, symbols, wrong, count)


def alignment_error_rate(
    found: Sequence[Iterable[Link]], gold: Sequence[tuple[set[Link], set[Link]]]
) -> float:
    """``1 - (|A & S| + |A & P|) / (|A| + |S|)`` over all sentences (Och & Ney 2003).

    gold: sure and possible links of each sentence, as `parse_pharaoh` gives them. Raises ValueError
    if there is no link at all.
    """
    matches = links = 0
    for ours, (sure, possible) in zip(map(set, found), gold, strict=True):
        matches += len(ours & sure) + len(ours & (possible | sure))
        links += len(ours) + len(sure)
    if not links:
        raise ValueError("there is no link to judge")
    return 1.0 - matches / links
