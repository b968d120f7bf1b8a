"""The stage "models": whole models at work on the GPU, ours beside the eager backend.

They have the sizes of the bundled recipes and random weights. The weights do not change the work,
since every target has the same length.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from benchmarks.common.problems import short_dtype_name
from benchmarks.targets.gpu.pool import Phase
from fused_attn.seq2seq.config import ModelConfig, SearchConfig
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.search.search import search

PHASES = (Phase("work", jobs=1, limit_s=60.0),)
# Sides of a search: ours, which replays captured steps; eager attention in steps from Python, as
# people run it; and eager attention in captured steps.
SIDES = {"training": ("auto", "eager"), "search": ("auto", "eager", "eager captured")}
BUDGET_S, ROUNDS = 0.5, 20


@dataclass(frozen=True)
class Work:
    """A model and what it does: "training" steps, "greedy" or "beam 5" search."""

    recipe: str
    config: ModelConfig
    what: str
    batch: int
    dtype: torch.dtype = torch.float32
    length: int = 40  # of source and target
    symbols: int = 4000

    @property
    def sides(self) -> tuple[str, ...]:
        return SIDES["training" if self.what == "training" else "search"]

    def __str__(self) -> str:
        dtype = short_dtype_name(self.dtype)
        fed = " fed" if self.config.input_feeding else ""
        return f"{self.recipe} {self.config.score}{fed} {dtype} {self.what} batch {self.batch}"


def _works() -> list[Work]:
    translate: dict[str, Any] = {
        "hidden": 512,
        "embedding": 256,
        "input_feeding": True,
        "dropout": 0.0,
    }
    general = ModelConfig(score="general", **translate)
    concat = ModelConfig(score="concat", **translate)
    bf16 = torch.bfloat16
    found = [Work("translate", general, "greedy", batch) for batch in (1, 64)]
    found += [Work("translate", replace(general, input_feeding=False), "training", 64)]
    found += [Work("translate", replace(concat, input_feeding=False), "training", 64)]
    found += [Work("translate", general, "beam 5", batch) for batch in (1, 64)]
    found += [Work("translate", general, "training", 64)]
    found += [Work("translate", concat, "greedy", batch) for batch in (1, 64)]
    found += [Work("translate", general, "greedy", 64, bf16)]
    found += [Work("translate", replace(general, input_feeding=False), "training", 64, bf16)]
    chat = ModelConfig(hidden=256, embedding=128, input_feeding=True, dropout=0.0)
    return [*found, Work("chat", chat, "greedy", 64), Work("chat", chat, "training", 64)]


@cache
def _items(device: str) -> dict[str, tuple[Work, str]]:
    works = _works()
    if device == "cpu":
        small: dict[str, Any] = {"hidden": 8, "embedding": 8}
        works = [
            replace(work, config=replace(work.config, **small), batch=2, length=4, symbols=20)
            for work in works[1:5:2]
        ]
    return {f"{work} | {side}": (work, side) for work in works for side in work.sides}


def items(phase: str, options: argparse.Namespace) -> list[str]:
    return list(_items(options.device))


def call_of(work: Work, side: str, device: str) -> Callable[[], object]:
    """A call without arguments: a training step with its update, or a search."""
    torch.manual_seed(0)
    backend, _, captured = side.partition(" ")
    model = Seq2Seq(work.config, work.symbols, work.symbols, backend=backend)
    model = model.to(device, work.dtype)
    shape = (work.batch, work.length)
    source = torch.randint(3, work.symbols, shape, device=device)
    lengths = torch.full((work.batch,), work.length, device=device)
    if work.what != "training":
        beam = int(work.what.partition(" ")[2] or 1)
        config = SearchConfig(beam=beam, min_length=work.length, max_length=work.length)
        model.eval()
        graphs = backend == "auto" or bool(captured)
        return lambda: search(model, source, lengths, config, graphs=graphs)
    target = torch.randint(3, work.symbols, (work.batch, work.length + 1), device=device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        model.loss(source, lengths, target).backward()
        optimizer.step()

    return step


def seconds_of(call: Callable[[], object], device: str) -> float:
    """The median seconds of a call, including what it launches on the GPU."""

    def once() -> float:
        began = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    for _ in range(3):  # compile, and look up once
        once()
    found: list[float] = []
    end = time.perf_counter() + BUDGET_S
    while not found or (len(found) < ROUNDS and time.perf_counter() < end):
        found.append(once())
    return statistics.median(found)


def run(phase: str, item: str, options: argparse.Namespace) -> dict[str, Any]:
    work, side = _items(options.device)[item]
    seconds = seconds_of(call_of(work, side, options.device), options.device)
    return {"work": seconds, "tokens_per_s": round(work.batch * work.length / seconds)}
