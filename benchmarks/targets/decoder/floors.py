"""The least time that this machine allows for a step, from its reads and its multiply-adds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from benchmarks.common import machine
from benchmarks.common.measure import Call
from fused_attn.choices import COMPUTE

BYTES = dict(zip(COMPUTE, (4, 2, 1), strict=True))
PEAK, READS = "peak", ("sum", "product", "square")
_FLAGS = {"bfloat16": {"avx512_bf16", "amx_bf16"}, "int8": {"avx512_vnni", "avx_vnni"}}


@cache
def _processor_flags() -> frozenset[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.split())


def peak_factors(flags: frozenset[str] | None = None) -> dict[str, int]:
    """The multiply-adds of each type in the time of one in float32.

    Two in bfloat16 with AVX512-BF16, four in int8 with VNNI, without them one.
    """
    found = _processor_flags() if flags is None else flags
    gains = {"float32": 1, "bfloat16": 2, "int8": 4}
    return {
        name: gain if name == "float32" or _FLAGS[name] & found else 1
        for name, gain in gains.items()
    }


@dataclass(frozen=True)
class Work:
    """What the products of a call read and do. Everything else is left out."""

    held: int  # elements of the matrices; their size decides which cache holds them
    reads: int  # elements read: a matrix once for all rows, but once for each step
    operations: int  # multiply-adds
    compute: str

    @property
    def held_bytes(self) -> int:
        return self.held * BYTES[self.compute]

    @property
    def read_bytes(self) -> int:
        return self.reads * BYTES[self.compute]


def work_of_step(weights: int, rows: int, compute: str) -> Work:
    """A step of ``rows`` rows, each of which multiplies with all ``weights`` elements."""
    return Work(weights, weights, weights * rows, compute)


@dataclass(frozen=True)
class Floor:
    """Seconds of the reads and of the multiply-adds, and the floor, of a step the larger."""

    reading: float
    multiplying: float
    bandwidth: float  # bytes a second
    peak: float  # multiply-adds a second, in the type of the products
    seconds: float


def floor_of(work: Work, bandwidth: float, peak: float, factors: dict[str, int]) -> Floor:
    """bandwidth: bytes a second. peak: multiply-adds in float32 a second."""
    own = peak * factors[work.compute]
    reading, multiplying = work.read_bytes / bandwidth, work.operations / own
    return Floor(reading, multiplying, bandwidth, own, max(reading, multiplying))


def one_after_another(works: Iterable[Work], floors: Iterable[Floor]) -> Floor:
    """The floor of several parts, with their bandwidth and peak on average."""
    parts = list(zip(works, floors, strict=True))
    reading, multiplying, seconds = (
        sum(getattr(floor, name) for _, floor in parts)
        for name in ("reading", "multiplying", "seconds")
    )
    bandwidth = sum(work.read_bytes for work, _ in parts) / reading
    peak = sum(work.operations for work, _ in parts) / multiplying
    return Floor(reading, multiplying, bandwidth, peak, seconds)


def limit_calls(size: int, threads: int) -> tuple[dict[str, Call], int]:
    """Calls that read a buffer of ``size`` bytes in three ways, and one of multiply-adds.

    They are timed among the sides of a row. Also returns the multiply-adds of that call.
    """
    width = 1024
    buffer = torch.ones(max(1, size // (4 * width)), width)
    flat, vector = buffer.flatten(), torch.ones(width)
    multiply, operations = machine.peak_call(threads)
    calls: dict[str, Call] = {
        READS[0]: buffer.sum,
        READS[1]: lambda: torch.mv(buffer, vector),
        READS[2]: lambda: torch.dot(flat, flat),
        PEAK: multiply,
    }
    return calls, operations // 2


def floor_from(seconds: Mapping[str, float], work: Work, operations: int) -> Floor:
    """The floor from the times of `limit_calls`. The fastest of the reads counts."""
    bandwidth = work.held_bytes / min(seconds[name] for name in READS)
    return floor_of(work, bandwidth, operations / seconds[PEAK], peak_factors())
