"""Dialogs: utterances one after another."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from fused_attn.seq2seq.data.pair_files import read_text
from fused_attn.seq2seq.errors import InputError

Dialogs = list[list[str]]


def of_corpus(language: str) -> Dialogs:
    """The dialogs of chatterbot-corpus in a language; raises `InputError` if it has none."""
    import yaml

    data = resources.files("chatterbot_corpus") / "data"
    languages = sorted(place.name for place in data.iterdir() if place.is_dir())
    if language not in languages:
        raise InputError(f"--corpus must be one of {', '.join(languages)}, got {language!r}")
    found: Dialogs = []
    for file in sorted((data / language).iterdir(), key=lambda file: file.name):
        if file.name.endswith((".yml", ".yaml")):
            text = file.read_text(encoding="utf-8")
            for dialog in yaml.safe_load(text)["conversations"]:
                found.append([_one_line(str(utterance)) for utterance in dialog])
    return found


def of_file(path: Path) -> Dialogs:
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
