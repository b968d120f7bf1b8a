"""Predict for a large file, in one process or in all processes that ``torchrun`` started.

Process r of n handles the batches r, r + n, r + 2 n, ... of lines, and writes one file for each to
the directory OUTPUT.parts, which must be on a file system that all processes share. Process 0 then
concatenates the files in the order of the input.
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

from fused_attn.seq2seq.data.pair_files import read_lines
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.outputs import write_atomically

BATCH_LINES = 1024  # lines
# Processes wait for the slowest one.
_TIMEOUT = timedelta(days=7)


@dataclass(frozen=True)
class Group:
    """The rank of this process among those that share the work, and their number."""

    rank: int = 0
    size: int = 1

    @classmethod
    def of_environment(cls) -> Group:
        """Return the group that ``torchrun`` set in the environment, by default one process."""
        return cls(*(int(os.environ.get(name, i)) for i, name in enumerate(("RANK", "WORLD_SIZE"))))

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank. Waits until all have called it."""
        if self.size == 1:
            return [value]
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=_TIMEOUT)
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found


def predict_file(
    source: Path,
    target: Path,
    answer: Callable[[list[bytes], int], str],
    group: Group,
    tally: Callable[[], Any] = lambda: None,
) -> list[Any]:
    """Write the output of ``answer`` for all lines of ``source`` to ``target``, in their order.

    answer: maps a batch of lines, and the number of lines before it, to the text to write.
    group: the processes that share the work. All of them must call this function.
    tally: called once after the last line of this process. Returns the values of all processes, by
        rank.

    Raises `InputError` in all processes if ``answer`` raises it in any of them; ``target`` is not
    changed then.
    """
    parts = target.with_name(target.name + ".parts")
    if group.rank == 0:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir()
    group.gather(None)
    problem: InputError | None = None
    try:
        for number, batch in enumerate(_batches(source)):
            if number % group.size == group.rank:
                text = answer(batch, number * BATCH_LINES)
                write_atomically(parts / f"{number:09}", text.encode())
    except InputError as error:
        problem = error
    problems = [text for text in group.gather(problem and str(problem)) if text is not None]
    tallies = group.gather(tally())
    try:
        if not problems and group.rank == 0:
            _join(parts, target)
    finally:
        if group.rank == 0:
            shutil.rmtree(parts, ignore_errors=True)
        group.gather(None)  # no process returns before the output is complete
        if dist.is_initialized():
            dist.destroy_process_group()
    if problems:
        raise InputError(problems[0])
    return tallies


def _batches(source: Path) -> Iterator[list[bytes]]:
    lines = read_lines(source)
    while batch := list(islice(lines, BATCH_LINES)):
        yield batch


def _join(parts: Path, target: Path) -> None:
    whole = parts / "whole"
    with whole.open("wb") as file:
        for part in sorted(path for path in parts.iterdir() if path.name.isdecimal()):
            with part.open("rb") as text:
                shutil.copyfileobj(text, file)
        file.flush()
        os.fsync(file.fileno())
    whole.replace(target)
