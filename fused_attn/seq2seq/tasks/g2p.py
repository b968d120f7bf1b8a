"""The task g2p: letters to phones, on the CMU pronouncing dictionary."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fused_attn.seq2seq.data.pairs import Data, Item, Pair, Symbols, fingerprint
from fused_attn.seq2seq.data.text_files import check_file
from fused_attn.seq2seq.data.texts import cleaned, counted, quoted
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.tasks import cmudict
from fused_attn.seq2seq.tasks.base import Task
from fused_attn.seq2seq.vocabulary import Vocabulary


@dataclass(frozen=True)
class G2PConfig:
    """Options of the task g2p.

    test_words: words to hold out as the test set; None chooses them by hash.
    limit_words: number of words for training and development; None uses all.
    lexicon: a file with additional words to train on, see `cmudict.read_lexicon`; None for none.
    """

    test_words: Symbols | None = None
    limit_words: int | None = None
    lexicon: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.lexicon, str | None):
            raise ValueError(f"lexicon must be the name of a file, got {quoted(self.lexicon)}")
        if self.limit_words is not None and self.limit_words < 1:
            raise ValueError(f"limit_words must be a positive number, got {self.limit_words}")


class G2P(Task):
    """Letters to phones, on the CMU pronouncing dictionary."""

    name, kind = "g2p", G2PConfig
    units, rates = ("words", "phones"), ("WER", "PER")
    only_trained_on = ("lexicon",)

    def load(self, *, links: bool = False) -> Data:
        lexicon = cmudict.load_dictionary()
        split = cmudict.split_words(lexicon, self.config.test_words, self.config.limit_words)
        phones = cmudict.phones(lexicon)
        pairs = [Pair(tuple(word), variant) for word in split.train for variant in lexicon[word]]
        notes: list[str] = []
        if self.config.lexicon is not None:
            pairs += self._more(Path(self.config.lexicon), split, set(pairs), notes)
        dev, test = (
            [Item(tuple(word), lexicon[word]) for word in words]
            for words in (split.dev, split.test)
        )
        letters, targets = Vocabulary(cmudict.LETTERS), Vocabulary(phones)
        return Data(letters, targets, pairs, dev, test, fingerprint(pairs), tuple(notes))

    def _more(
        self,
        path: Path,
        split: cmudict.Split,
        known: Collection[Pair],
        notes: list[str],
    ) -> list[Pair]:
        """The new pairs of a lexicon file, without words of the development and test sets."""
        check_file(path)
        more = cmudict.read_lexicon(path)
        judged = set(self.config.test_words or ()).union(split.dev, split.test)
        if left_out := len(more.keys() & judged):
            words = counted(left_out, "word")
            notes.append(f"{path}: skipped {words} of the development and test sets")
        found = [
            Pair(tuple(w), v) for w, variants in more.items() if w not in judged for v in variants
        ]
        return [pair for pair in found if pair not in known]

    @classmethod
    def test_option(cls, path: Path) -> dict[str, Any]:
        return {"test_words": tuple(sorted(cmudict.read_test(path)))}

    def read(self, text: str) -> Symbols:
        return tuple(cleaned(text).strip().lower())

    def show(self, source: Iterable[str]) -> str:
        return "".join(source)

    def listed(self, path: Path) -> tuple[list[Item], list[str]]:
        listed = cmudict.read_test(path)
        if all(listed.values()):
            return [Item(tuple(word), variants) for word, variants in sorted(listed.items())], []
        lexicon = cmudict.load_dictionary()
        words = sorted(word for word in listed if word in lexicon)
        if not words:
            raise InputError(
                f"none of the words in {path} is in the dictionary; with a word and its phones on "
                "each line (WORD PHONE PHONE ...), any words can be evaluated"
            )
        unknown = len(listed) - len(words)
        verb = "is" if unknown == 1 else "are"
        missing = f"{path}: {counted(unknown, 'word')} {verb} not in the dictionary"
        return [Item(tuple(word), lexicon[word]) for word in words], [missing] if unknown else []
