"""Results as lines of JSON, each on the disk before the next call can crash."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def append(path: Path, line: Line) -> None:
    """Append a complete line, whatever other processes write to the file at the same time."""
    data = (json.dumps(line) + "\n").encode()
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":  # a writer was killed midway
            data = b"\n" + data
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path) -> list[Line]:
    """The lines of a file, without those that a killed writer left incomplete."""
    if not path.exists():
        return []
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            found.append(line)
    return found


def items(lines: Iterable[Line], phase: str | None = None) -> dict[tuple[str, str], Line]:
    """The lines by phase and item; the last one where an item has several."""
    return {
        (line["phase"], line["item"]): line
        for line in lines
        if "item" in line and phase in (None, line["phase"])
    }


def short(error: BaseException, size: int = 200) -> str:
    """The type of an error and the first line of its message."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"[:size]
