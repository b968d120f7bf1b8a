"""Busy neighbours: processes that only spin."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.common import machine

# It says when it spins, and ends by itself if this process is killed before it.
_SPIN = """
import os, time
parent = os.getppid()
print("spinning", flush=True)
while os.getppid() == parent:
    end = time.perf_counter() + 0.1
    while time.perf_counter() < end:
        pass
"""


@contextmanager
def busy_cores() -> Iterator[None]:
    """One process for each core, until the end of the block."""
    command = [sys.executable, "-c", _SPIN]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(machine.cores())
    ]
    try:
        for process in running:
            assert process.stdout is not None
            process.stdout.readline()
        yield
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.communicate()
