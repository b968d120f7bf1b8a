"""Predict for a large file, in one process or in all processes that ``torchrun`` started.

Process r of n handles the batches r, r + n, r + 2 n, ... of lines, and writes one file for each to
a temporary directory beside the output, which must be on a file system that all processes share.
Process 0 then concatenates the files in the order of the input.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fused_attn.seq2seq.data.text_files import read_lines
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.outputs import scratch_directory, write_synced, writing

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

    Raises `InputError` in all processes if ``answer`` raises it in any of them, or if the output
    cannot be written; ``target`` is not changed then, unless it is a device or a FIFO.
    """
    problem: str | None = None
    parts: Path | None = None
    try:
        if group.rank == 0:
            try:
                parts = scratch_directory(target)
            except OSError as error:
                problem = _cannot_write(target, error)
        shared, stopped = group.gather((parts, problem))[0]
        if stopped is None:
            problem = _write_parts(source, target, shared, answer, group)
        problems = [text for text in group.gather(problem) if text is not None]
        tallies = group.gather(tally())
        if not problems and parts is not None:
            problem = _join(parts, target)
        problems = problems or [text for text in group.gather(problem) if text is not None]
    finally:
        if parts is not None:
            shutil.rmtree(parts, ignore_errors=True)
        if dist.is_initialized():
            with suppress(RuntimeError):  # another process may have died
                dist.destroy_process_group()
    if problems:
        raise InputError(problems[0])
    return tallies


def _write_parts(
    source: Path,
    target: Path,
    parts: Path,
    answer: Callable[[list[bytes], int], str],
    group: Group,
) -> str | None:
    """Write the batches of this process; returns what went wrong, if anything did."""
    try:
        for number, batch in enumerate(_batches(source)):
            if number % group.size == group.rank:
                text = answer(batch, number * BATCH_LINES).encode()
                try:
                    write_synced(parts / f"{number:09}", text)
                except OSError as error:
                    return _cannot_write(target, error)
    except InputError as error:
        return error.on_the_command_line
    return None


def _batches(source: Path) -> Iterator[list[bytes]]:
    lines = read_lines(source)
    while batch := list(islice(lines, BATCH_LINES)):
        yield batch


def _join(parts: Path, target: Path) -> str | None:
    """Write all parts to the output; returns what went wrong, if anything did."""
    try:
        with writing(target) as file:
            for part in sorted(parts.iterdir()):
                with part.open("rb") as text:
                    shutil.copyfileobj(text, file)
    except BrokenPipeError:
        raise
    except OSError as error:
        return _cannot_write(target, error)
    return None


def _cannot_write(target: Path, error: OSError) -> str:
    return f"cannot write {target}: {error.strerror}"
