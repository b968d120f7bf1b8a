"""Dialogs: each utterance is the source of the next one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from pathlib import Path

from fused_attn.seq2seq.config import ModelConfig, TrainingConfig
from fused_attn.seq2seq.data.pair_files import read_text
from fused_attn.seq2seq.data.pairs import DEV_SHARE, Data, Pair, fingerprint, grouped, place
from fused_attn.seq2seq.errors import InputError, OptionError
from fused_attn.seq2seq.tasks.text import TextConfig, TextTask

Dialogs = list[list[str]]


def read_corpus(language: str) -> Dialogs:
    """The dialogs of chatterbot-corpus in a language; raises `InputError` if it has none."""
    import yaml

    data = resources.files("chatterbot_corpus") / "data"
    languages = sorted(place.name for place in data.iterdir() if place.is_dir())
    if language not in languages:
        raise OptionError("corpus", f"must be one of {', '.join(languages)}, got {language!r}")
    found: Dialogs = []
    for file in sorted((data / language).iterdir(), key=lambda file: file.name):
        if file.name.endswith((".yml", ".yaml")):
            text = file.read_text(encoding="utf-8")
            for dialog in yaml.safe_load(text)["conversations"]:
                found.append([_one_line(str(utterance)) for utterance in dialog])
    return found


def read_dialogs(path: Path) -> Dialogs:
    """The dialogs of a file, an utterance a line, with a blank line between them.

    Raises `InputError` if it cannot be read or has none.
    """
    found: Dialogs = [[]]
    for line in read_text(path).splitlines():
        if line.strip():
            found[-1].append(_one_line(line))
        elif found[-1]:
            found.append([])
    if not any(len(dialog) > 1 for dialog in found):
        raise InputError(f"{path} has no dialog: expected an utterance a line, and two at least")
    return found


def _one_line(text: str) -> str:
    return " ".join(text.split())


@dataclass(frozen=True)
class ChatConfig(TextConfig):
    """corpus: language of chatterbot-corpus: "english", "korean" or another that it has.
    dialogs: a file of your own in its place: an utterance a line, a blank line between dialogs.
    skip_bad: as the corpus has utterances of a page, these are left out.
    """

    tokens: str = "subwords"
    vocabulary: int = 4_000
    max_length: int = 80
    skip_bad: bool = True
    corpus: str = "english"
    dialogs: str | None = None


class Chat(TextTask):
    """What is said next: each utterance of a dialog is the source of the one after it."""

    name, kind = "chat", ChatConfig
    units, rates = ("utterances", "symbols"), ("replies wrong", "symbols wrong")
    by_perplexity = True
    model = ModelConfig(hidden=256, embedding=128, input_feeding=True, dropout=0.3)
    training = TrainingConfig(epochs=30, batch_size=64, lr=2e-3)
    config: ChatConfig

    def load(self) -> Data:
        config = self.config
        if config.dialogs is None:
            found, where = read_corpus(config.corpus), f"--corpus {config.corpus}"
        else:
            found, where = read_dialogs(Path(config.dialogs)), config.dialogs
        self.learn((utterance, "") for dialog in found for utterance in dialog)
        pairs, skipped = self._pairs(found, where)
        held = {pair.source for pair in pairs if place(pair.source) < DEV_SHARE}
        train = [pair for pair in pairs if pair.source not in held]
        dev = [pair for pair in pairs if pair.source in held] or pairs[:1]
        if not train:
            raise InputError(f"{where}: there are too few utterances")
        source, target = self.vocabularies(train)
        notes = (f"{where}: {skipped} bad lines were left out",) if skipped else ()
        return Data(source, target, train, grouped(dev), grouped(dev), fingerprint(train), notes)

    def _pairs(self, found: Sequence[Sequence[str]], where: str) -> tuple[list[Pair], int]:
        pairs, skipped, reader = [], 0, self.reader
        for dialog in found:
            for source, target in pairwise(dialog):
                try:
                    pairs.append(reader.pair(source, target))
                except ValueError as error:
                    if not reader.skip_bad:
                        raise InputError(f"{where}: {source[:40]!r}: {error}") from None
                    skipped += 1
        return pairs, skipped
