"""The task scan: SCAN commands to actions (Lake & Baroni 2018)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fused_attn.seq2seq.config import ModelConfig, TrainingConfig
from fused_attn.seq2seq.data.pairs import (
    DEV_SHARE,
    Data,
    Item,
    Pair,
    Symbols,
    fingerprint,
    unit_hash,
)
from fused_attn.seq2seq.data.text_files import read_numbered
from fused_attn.seq2seq.data.texts import quoted
from fused_attn.seq2seq.errors import InputError, OptionError
from fused_attn.seq2seq.tasks import scan_grammar
from fused_attn.seq2seq.tasks.base import Task
from fused_attn.seq2seq.vocabulary import Vocabulary

# Share of the commands that the split "simple" holds out as the test set.
TEST_SHARE = 0.2


@dataclass(frozen=True)
class ScanConfig:
    """Options of the task scan.

    split: one of `scan_grammar.SPLITS`.
    test_commands: commands to hold out as the test set of the split "simple"; None chooses them by
        hash.
    """

    split: str = "simple"
    test_commands: Symbols | None = None

    def __post_init__(self) -> None:
        if self.split not in scan_grammar.SPLITS:
            raise ValueError(
                f"split must be one of {', '.join(scan_grammar.SPLITS)}, got {self.split!r}"
            )
        if self.test_commands is not None and self.split != "simple":
            raise ValueError(f"test needs --split simple, got {self.split!r}")


class Scan(Task):
    """SCAN commands to actions (Lake & Baroni 2018), generated from the grammar."""

    name, kind = "scan", ScanConfig
    units, rates = ("commands", "actions"), ("commands wrong", "actions wrong")
    model = ModelConfig(hidden=128, embedding=64, dropout=0.1)
    training = TrainingConfig(epochs=10, batch_size=64, bucket=False, lr=4e-3)

    def load(self, *, links: bool = False) -> Data:
        every = scan_grammar.commands()
        if self.config.split == "simple":
            train, test = self._simple(every)
        else:
            train, test = scan_grammar.split_commands(self.config.split)
        copies = Counter(source for source, _ in train)
        # A command that a split repeats must stay in the training set.
        held = {s for s, count in copies.items() if count == 1 and unit_hash(s) < DEV_SHARE}
        dev = [pair for pair in every if pair[0] in held]
        words = sorted({word for source, _ in every for word in source})
        actions = sorted({action for _, target in every for action in target})
        pairs = [Pair(*pair) for pair in train if pair[0] not in held]
        return Data(
            Vocabulary(words),
            Vocabulary(actions),
            pairs,
            [Item(source, (target,)) for source, target in dev],
            [Item(source, (target,)) for source, target in test],
            fingerprint(pairs),
        )

    @classmethod
    def test_option(cls, path: Path) -> dict[str, Any]:
        known = {" ".join(source) for source, _ in scan_grammar.commands()}
        found = set()
        for number, text in read_numbered(path):
            line = " ".join(text.split())
            if line and line not in known:
                raise InputError(f"{path}, line {number}: {quoted(line)} is not a command of SCAN")
            found.add(line)
        return {"test_commands": tuple(sorted(found - {""}))}

    def listed(self, path: Path) -> tuple[list[Item], list[str]]:
        meaning = dict(scan_grammar.commands())
        lines = [tuple(line.split()) for line in self.test_option(path)["test_commands"]]
        if not lines:
            raise InputError(f"{path} has no commands")
        return [Item(line, (meaning[line],)) for line in lines], []

    def _simple(
        self, every: Sequence[scan_grammar.Pair]
    ) -> tuple[list[scan_grammar.Pair], list[scan_grammar.Pair]]:
        if self.config.test_commands is None:
            kept = {source for source, _ in every if unit_hash(("test", *source)) < TEST_SHARE}
        else:
            kept = {tuple(line.split()) for line in self.config.test_commands}
            if unknown := kept - {source for source, _ in every}:
                raise OptionError("test", f": {' '.join(min(unknown))!r} is not a command of SCAN")
        train = [pair for pair in every if pair[0] not in kept]
        return train, [pair for pair in every if pair[0] in kept]
