"""Predicting for a large file, by one process or by all that ``torchrun`` started.

Each process takes every so manieth lot of lines and writes what comes of it to a file of its own,
in OUTPUT.parts, which all of them have to see; the first joins them in the order of the input.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fused_attn.seq2seq.checkpoints.files import write_atomically
from fused_attn.seq2seq.data.pair_files import read_lines
from fused_attn.seq2seq.errors import InputError

LOT = 1024  # lines
# One process may have to wait long for another.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Group:
    """This process among those that share the work."""

    rank: int = 0
    size: int = 1

    @classmethod
    def of_environment(cls) -> Group:
        """The group that ``torchrun`` has set up."""
        return cls(*(int(os.environ.get(name, i)) for i, name in enumerate(("RANK", "WORLD_SIZE"))))

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, once all of them are here."""
        if self.size == 1:
            return [value]
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=_PATIENCE)
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found


def predict_file(
    source: Path, target: Path, answer: Callable[[list[bytes], int], str], group: Group
) -> None:
    """Write what ``answer`` makes of the lines of ``source`` to ``target``, in their order.

    answer: takes lines and how many are before them, and returns lines.

    Raises `InputError` in every process if a line cannot be read in any; ``target`` is then as it
    was before.
    """
    parts = target.with_name(target.name + ".parts")
    if group.rank == 0:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir()
    group.gather(None)
    problem: InputError | None = None
    try:
        for number, lot in enumerate(_lots(source)):
            if number % group.size == group.rank:
                text = answer(lot, number * LOT)
                write_atomically(parts / f"{number:09}", text.encode())
    except InputError as error:
        problem = error
    problems = [text for text in group.gather(problem and str(problem)) if text is not None]
    try:
        if not problems and group.rank == 0:
            _join(parts, target)
    finally:
        if group.rank == 0:
            shutil.rmtree(parts, ignore_errors=True)
        group.gather(None)  # nobody leaves before the output is there
        if dist.is_initialized():
            dist.destroy_process_group()
    if problems:
        raise InputError(problems[0])


def _lots(source: Path) -> Iterator[list[bytes]]:
    lines = read_lines(source)
    while lot := list(islice(lines, LOT)):
        yield lot


def _join(parts: Path, target: Path) -> None:
    whole = parts / "whole"
    with whole.open("wb") as file:
        for part in sorted(path for path in parts.iterdir() if path.name.isdecimal()):
            with part.open("rb") as text:
                shutil.copyfileobj(text, file)
        file.flush()
        os.fsync(file.fileno())
    whole.replace(target)
