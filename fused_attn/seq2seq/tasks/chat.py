"""The task chat: answer an utterance of a dialog with the next one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from pathlib import Path

from fused_attn.seq2seq.config import ModelConfig, TrainingConfig
from fused_attn.seq2seq.data.pairs import DEV_SHARE, Data, Pair, fingerprint, grouped, unit_hash
from fused_attn.seq2seq.data.text_files import check_file, read_numbered
from fused_attn.seq2seq.data.texts import counted, quoted
from fused_attn.seq2seq.errors import InputError, OptionError
from fused_attn.seq2seq.tasks.text import (
    DEV_PAIRS,
    TextConfig,
    TextTask,
    check_name,
    held_out,
    nothing_held_out,
)

Dialogs = list[list[str]]


def read_corpus(language: str) -> Dialogs:
    """Return the dialogs of chatterbot-corpus in a language; raises `InputError` if missing."""
    import yaml

    data = resources.files("chatterbot_corpus") / "data"
    languages = sorted(entry.name for entry in data.iterdir() if entry.is_dir())
    if language not in languages:
        raise OptionError("corpus", f"must be one of {', '.join(languages)}, got {language!r}")
    found: Dialogs = []
    for file in sorted((data / language).iterdir(), key=lambda file: file.name):
        if file.name.endswith((".yml", ".yaml")):
            text = file.read_text(encoding="utf-8")
            for dialog in yaml.safe_load(text)["conversations"]:
                found.append([_one_line(str(utterance)) for utterance in dialog])
    return found


def read_dialogs(path: Path, normalization: str | None = "NFC") -> list[list[tuple[int, str]]]:
    """Return the dialogs of a file: one utterance per line, a blank line between dialogs.

    Each utterance comes with the number of its line, from 1.

    Raises `InputError` if the file cannot be read or has no dialog of two utterances.
    """
    check_file(path)
    found: list[list[tuple[int, str]]] = [[]]
    for number, line in read_numbered(path, normalization):
        if line.strip():
            found[-1].append((number, _one_line(line)))
        elif found[-1]:
            found.append([])
    if not any(len(dialog) > 1 for dialog in found):
        raise InputError(
            f"{path} has no dialog: expected one utterance per line, and at least two in a row"
        )
    return found


def _one_line(text: str) -> str:
    return " ".join(text.split())


@dataclass(frozen=True)
class ChatConfig(TextConfig):
    """Options of the task chat, besides those of `TextConfig`.

    corpus: a language of chatterbot-corpus: "english", "korean", ...
    dialogs: a file to use instead: one utterance per line, a blank line between dialogs. The corpus
        is None then.
    skip_bad: True here, because some utterances of the corpus are a page long.
    """

    tokens: str = "subwords"
    vocabulary: int = 4_000
    max_length: int = 80
    skip_bad: bool = True
    corpus: str | None = "english"
    dialogs: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("corpus", "dialogs"):
            check_name(name, getattr(self, name))
        if self.dialogs is not None:
            object.__setattr__(self, "corpus", None)


class Chat(TextTask):
    """Answers in a dialog: each utterance is the source, and the next one its target."""

    name, kind = "chat", ChatConfig
    units, rates = ("utterances", "symbols"), ("replies wrong", "symbols wrong")
    by_perplexity = True
    only_trained_on = ("dialogs",)
    model = ModelConfig(hidden=256, embedding=128, input_feeding=True, dropout=0.3)
    training = TrainingConfig(epochs=30, batch_size=64, lr=2e-3)
    config: ChatConfig

    @property
    def has_data(self) -> bool:  # an exported model does not name the file of its dialogs
        return self.config.corpus is not None or self.config.dialogs is not None

    def load(self, *, links: bool = False) -> Data:
        config = self.config
        dialogs: list[list[tuple[int, str]]]
        if config.dialogs is not None:
            where = config.dialogs
            dialogs = read_dialogs(Path(config.dialogs), config.normalization)
        elif config.corpus is not None:
            where = f"--corpus {config.corpus}"
            dialogs = [list(enumerate(dialog, 1)) for dialog in read_corpus(config.corpus)]
        else:
            raise InputError("the model does not name the dialogs that it was trained on")
        self.learn((utterance, "") for dialog in dialogs for _, utterance in dialog)
        pairs, notes = self._pairs(dialogs, where)
        held = {pair.source for pair in pairs if unit_hash(pair.source) < DEV_SHARE}
        if len(held) < config.least_dev:
            train, dev = pairs, pairs[:DEV_PAIRS]
            about = nothing_held_out(counted(len(dev), "pair"))
        else:
            train = [pair for pair in pairs if pair.source not in held]
            dev = [pair for pair in pairs if pair.source in held] or pairs[:1]
            about = held_out(len(dev), len(pairs))
        if not train:
            raise InputError(f"{where}: no pair of utterances is left to train on")
        notes.append(f"{where}: {about}")
        source, target = self.vocabularies(train)
        digest = fingerprint(train)
        return Data(source, target, train, grouped(dev), grouped(dev), digest, tuple(notes))

    def _pairs(
        self, dialogs: Sequence[Sequence[tuple[int, str]]], where: str
    ) -> tuple[list[Pair], list[str]]:
        """The pairs of successive utterances, and notes."""
        pairs: list[Pair] = []
        skipped: list[str] = []
        reader = self.reader
        for dialog in dialogs:
            for (number, source), (_, target) in pairwise(dialog):
                try:
                    pairs.append(reader.pair(source, target))
                except ValueError as error:
                    line = "" if self.config.dialogs is None else f", line {number}"
                    reason = f"{where}{line}: {error}, in {quoted(source)} and its reply"
                    if not reader.skip_bad:
                        raise InputError(reason, reader.hint(error, "pair")) from None
                    skipped.append(reason)
        if skipped and not pairs:
            raise InputError(
                f"{where}: no usable pairs ({len(skipped)} skipped), first {skipped[0]}"
            )
        return pairs, [f"{where}: skipped {counted(len(skipped), 'bad pair')}"] if skipped else []
