"""Error rates against one or several references, and the alignment error rate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Link = tuple[int, int]  # positions in source and target, from 0

# For these metrics higher is better; for all others lower is better.
_HIGHER_IS_BETTER = ("BLEU", "chrF")
PERPLEXITY = "perplexity"


def cost(name: str, value: float) -> float:
    """Return the value of a metric, negated if higher is better, so that lower is better."""
    return -value if name in _HIGHER_IS_BETTER else value


def shown(name: str, value: float) -> str:
    """Format the value of a metric for display."""
    if name == PERPLEXITY:
        return f"{value:.2f}"
    return f"{100 * value:.2f}" + ("" if name in _HIGHER_IS_BETTER else " %")


def edit_distance(hypothesis: Sequence[str], reference: Sequence[str]) -> int:
    """Return the Levenshtein distance: insertions, deletions and substitutions cost 1 each."""
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
    """Counts over all hypotheses, each compared with the nearest of its references."""

    edits: int  # edit distances to the nearest references
    reference_symbols: int  # symbols in those references
    wrong: int  # hypotheses that equal none of their references
    count: int  # hypotheses

    @property
    def symbol_error_rate(self) -> float:
        """Edits per reference symbol; for pronunciations, the phone error rate (PER)."""
        return self.edits / self.reference_symbols

    @property
    def sequence_error_rate(self) -> float:
        """Share of hypotheses with any error; for pronunciations, the word error rate (WER)."""
        return self.wrong / self.count


def error_rates(
    judged: Iterable[tuple[Sequence[str], Sequence[Sequence[str]]]],
) -> ErrorRates:
    """Compare each hypothesis with the nearest of its references, the first one in a tie.

    judged: pairs of a hypothesis and its references. Raises ValueError if all references are empty
    or there are no pairs.
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
        raise ValueError("cannot compute error rates: there are no reference symbols")
    return ErrorRates(edits, symbols, wrong, count)


def alignment_error_rate(
    found: Sequence[Iterable[Link]], gold: Sequence[tuple[set[Link], set[Link]]]
) -> float:
    """Return ``1 - (|A & S| + |A & P|) / (|A| + |S|)`` over all sentences (Och & Ney 2003).

    found: the links A of each sentence. gold: the sure links S and the possible links P of each
    sentence, as `parse_pharaoh` returns them. Raises ValueError if there are no links at all, or
    the numbers of sentences differ.
    """
    matches = links = 0
    for ours, (sure, possible) in zip(map(set, found), gold, strict=True):
        matches += len(ours & sure) + len(ours & (possible | sure))
        links += len(ours) + len(sure)
    if not links:
        raise ValueError("cannot compute the alignment error rate: there are no links")
    return 1.0 - matches / links
