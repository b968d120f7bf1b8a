"""Measure the rows of steps and searches: judged first, then all sides in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.common import machine
from benchmarks.common.measure import Call, medians
from benchmarks.targets.decoder import ours, torch_path
from benchmarks.targets.decoder.attn_lstm import attn_lstm
from benchmarks.targets.decoder.figures import Result
from benchmarks.targets.decoder.floors import floor_from, limit_calls, work_of_step
from benchmarks.targets.decoder.neighbours import busy_cores
from benchmarks.targets.decoder.plain import loop, oracle_hidden, oracle_logits
from benchmarks.targets.decoder.problem import (
    SOURCE_SYMBOLS,
    TOLERANCES,
    Problem,
    error_of_symbols,
    make_problem,
    weights_of_step,
)
from benchmarks.targets.decoder.rows import (
    ATTN_LSTM,
    BUSY_TARGET,
    COMPILED,
    LOOP,
    ONE_THREAD,
    OURS,
    THREADS_TARGET,
    TORCH,
    TWO_THREADS,
    SearchRow,
    Sizes,
    StepRow,
)
from fused_attn.seq2seq.config import SearchConfig

ROUNDS = 15
Side = Callable[[], Tensor]
Errors = Mapping[str, tuple[float, float]]


def measure_steps(row: StepRow, sizes: Sizes, threads: int, budget_s: float) -> Iterator[Result]:
    """One result for each type of the products; the rivals are timed once, in the same rounds."""
    problem = make_problem(sizes, row.score, row.batch)
    computes, weights = list(row.targets), weights_of_step(sizes, row.score)
    with torch.no_grad():
        sides, missing = _sides(row, problem, threads)
        errors = {name: error_of(problem, name, side()) for name, side in sides.items()}
        calls: dict[str, Call] = {
            name: side for name, side in sides.items() if errors[name][0] <= errors[name][1]
        }
        works = {name: work_of_step(weights, row.batch, name) for name in computes}
        limits = {name: limit_calls(work.held_bytes, threads) for name, work in works.items()}
        for name, (yardsticks, _) in limits.items():
            calls |= {f"{name} {each}": call for each, call in yardsticks.items()}
        seconds = medians(calls, budget_s, ROUNDS)
    per_step = {name: seconds[name] / sizes.steps for name in sides if name in seconds}
    rivals = {name: value for name, value in per_step.items() if name in row.rivals}
    for compute, (yardsticks, operations) in limits.items():
        own = {each: seconds[f"{compute} {each}"] for each in yardsticks}
        floor = floor_from(own, works[compute], operations)
        times = {OURS: per_step[compute]} | rivals if compute in per_step else rivals
        judged = {name: errors[name] for name in row.rivals if name in errors}
        judged |= {OURS: errors[compute]} if compute in errors else {}
        yield Result(
            row.label, compute, times, row.targets[compute], floor, errors=judged, missing=missing
        )


def _sides(row: StepRow, problem: Problem, threads: int) -> tuple[dict[str, Side], dict[str, str]]:
    """The sides that run here, and why the rivals that do not run here do not."""
    makers: dict[str, Callable[[], Side]] = {
        LOOP: lambda: loop(problem),
        COMPILED: lambda: loop(problem, compiled=True),
        ATTN_LSTM: lambda: attn_lstm(problem, threads),
        TORCH: lambda: torch_path.steps(problem),
    }
    wanted = {name: makers[name] for name in row.rivals}
    for compute in row.targets:
        wanted[compute] = lambda compute=compute: ours.steps(problem, compute)
    found, missing = {}, {}
    for name, make in wanted.items():
        try:
            side = make()
            side()  # compiles, where something is compiled
            found[name] = side
        except Exception as error:  # a rival may need a compiler that is not here
            if name in row.targets:
                raise
            missing[name] = str(error).splitlines()[0]
    return found, missing


def error_of(problem: Problem, name: str, result: Tensor) -> tuple[float, float]:
    """The error of a side's result against the float64 model, and its limit."""
    limit = TOLERANCES.get(name, TOLERANCES["float32"])
    if problem.chooses:
        return error_of_symbols(result, oracle_logits(problem, result)), limit
    expected = oracle_hidden(problem, squash=name != ATTN_LSTM)
    return float((result.double() - expected).abs().max() / expected.std()), limit


def measure_search(row: SearchRow, sizes: Sizes, budget_s: float) -> Result:
    """Beam search in float32; every target has all steps."""
    problem = make_problem(sizes, "general", 1)
    source = torch.randint(3, SOURCE_SYMBOLS, (row.batch, sizes.source))
    lengths = torch.full((row.batch,), sizes.source)
    config = SearchConfig(beam=row.beam, min_length=sizes.steps, max_length=sizes.steps)
    sides = {
        OURS: ours.searched(problem.model, source, lengths, config),
        TORCH: torch_path.searched(problem.model, source, lengths, config),
    }
    found, expected = (sides[name]() for name in (OURS, TORCH))
    error = max(
        abs(a[0].log_prob - b[0].log_prob) / abs(b[0].log_prob)
        for a, b in zip(found, expected, strict=True)
    )
    judged = Result(
        row.label, "float32", {}, (row.target,), errors={OURS: (error, TOLERANCES["float32"])}
    )
    if judged.wrong:
        return judged
    return replace(judged, seconds=medians(sides, budget_s, ROUNDS))


def _ours(sizes: Sizes, batch: int) -> tuple[Call, Errors]:
    problem = make_problem(sizes, "general", batch)
    call = ours.steps(problem, "float32")
    return call, {OURS: error_of(problem, "float32", call())}


def measure_threads(batch: int, sizes: Sizes, budget_s: float) -> Result:
    """Steps with one thread and with two, in turns."""
    label = f"general, B={batch}, threads"
    counts = {ONE_THREAD: 1, TWO_THREADS: 2}
    if machine.cores() < 2:
        return Result(
            label, "float32", {}, (THREADS_TARGET,), missing={OURS: "there is one core only"}
        )
    call, errors = _ours(sizes, batch)
    judged = Result(label, "float32", {}, (THREADS_TARGET,), errors=errors)
    if judged.wrong:
        return judged
    with machine.using_threads(1):
        seconds = medians(
            dict.fromkeys(counts, call), budget_s, ROUNDS,
            before=lambda name: torch.set_num_threads(counts[name]),
        )  # fmt: skip
    beside = {name: value / sizes.steps for name, value in seconds.items()}
    return replace(judged, seconds={OURS: beside[ONE_THREAD]}, beside=beside)


def measure_busy(batch: int, sizes: Sizes, budget_s: float) -> Result:
    """Steps on the machine as it is, and beside a busy process on each core."""
    call, errors = _ours(sizes, batch)
    judged = Result(f"general, B={batch}, busy", "float32", {}, (BUSY_TARGET,), errors=errors)
    if judged.wrong:
        return judged
    beside = {}
    beside["quiet"] = medians({OURS: call}, budget_s, ROUNDS)[OURS] / sizes.steps
    with busy_cores():
        beside["busy"] = medians({OURS: call}, budget_s, ROUNDS)[OURS] / sizes.steps
    return replace(judged, seconds={OURS: beside["quiet"]}, beside=beside)
