"""Time several calls in turns, so that disturbances of the machine affect all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

Call = Callable[[], object]


def _seconds(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def medians(
    calls: Mapping[str, Call],
    budget_s: float,
    rounds: int = 25,
    window_s: float = 0.01,
    before: Callable[[str], object] | None = None,
) -> dict[str, float]:
    """The median of `samples` for each call."""
    found = samples(calls, budget_s, rounds, window_s, before)
    return {name: statistics.median(times) for name, times in found.items()}


def samples(
    calls: Mapping[str, Call],
    budget_s: float,
    rounds: int = 25,
    window_s: float = 0.01,
    before: Callable[[str], object] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each call in at least 3 rounds, and at most ``rounds`` or ``budget_s``.

    In a round each call runs once, or as often as fills ``window_s``, below which the clock is too
    coarse. ``before`` receives the name of the call whose turn it is, outside the measured time.
    """
    prepare = before or (lambda name: None)
    repeats = {}
    for name, call in calls.items():
        prepare(name)
        first = _seconds(call, 1)  # warms up caches, allocators and threads
        if first < window_s:
            first = _seconds(call, 1)
        repeats[name] = max(1, round(window_s / max(first, 1e-9)))
    found: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + budget_s
    for done in range(rounds):
        if done >= 3 and time.perf_counter() > end:
            break
        for name, call in calls.items():
            prepare(name)
            found[name].append(_seconds(call, repeats[name]))
    return found
