"""The machine: what it is, what it does at best, and settings that are restored afterwards."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.measure import Call
from fused_attn import backends, info

READ_BYTES = 256 << 20  # more than any cache holds
PEAK_ROUNDS = 200  # a few milliseconds on one thread


def native() -> Any:
    """The native module of the cpu backend."""
    return backends.load("cpu").native


def cores() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def _large() -> Tensor:
    return torch.ones(READ_BYTES // 4)  # not zeros, which the system may map to one page


def read_call() -> Call:
    """Read `READ_BYTES` from memory, with the threads of torch."""
    return _large().sum


def peak_call(threads: int) -> tuple[Call, int]:
    """Multiply-adds in registers on ``threads`` threads, and the number of operations done."""
    multiply_adds, rounds = native().multiply_adds, PEAK_ROUNDS * threads
    return lambda: multiply_adds(rounds, threads), rounds * multiply_adds(1, 1)


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Run torch and the native module with ``count`` threads, and restore the number before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def using_isa(name: str | None) -> Iterator[None]:
    """Run the native module with another instruction set; None leaves it alone."""
    if name is None:
        yield
        return
    before = native().cpu_isa()
    native().set_cpu_isa(name)
    try:
        yield
    finally:
        native().set_cpu_isa(before)


def provenance(threads: int) -> dict[str, Any]:
    """What every figure carries with it: date, processor, threads, versions."""
    facts = info.collect()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": facts["processor"],
        "instruction_set": facts["instruction_set"]["in_use"],
        "cores": cores(),
        "threads": threads,
        "system": facts["system"],
        "versions": facts["versions"],
    }


def slug(name: str) -> str:
    """The name of a machine or GPU as a directory: lower case, words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
