"""fused_attn against what people write: errors against float64, and time of attention.

Both sides get the whole call: projections of general and concat included, lengths given, gradients
of every input and parameter. The chain is `fused_attn.testing.plain_attention`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.measure import Call, medians
from benchmarks.problems import G2P, SCORES, SENTENCES, Shape, inputs_of
from benchmarks.table import duration, render
from fused_attn import backends, functional, testing
from fused_attn.testing import Inputs, Tensors, Verdict

SHAPES = (G2P, SENTENCES)
# Columns of the table of errors, and the results that they show, whatever the score calls them.
RESULTS = {
    "context": ("context",),
    "d query": ("grad_query",),
    "d memory": ("grad_memory",),
    "d W / W_q": ("grad_weight", "grad_query_weight"),
    "d W_m": ("grad_memory_weight",),
    "d v": ("grad_v",),
}
WITHHELD = "withheld"

Attend = Callable[[Tensors], Tensor]


@dataclass(frozen=True)
class Measured:
    """One score at one shape. No times where the fused results exceeded the error budget."""

    shape: Shape
    score: str
    verdicts: dict[str, Verdict]  # by result
    seconds: dict[str, float]  # by what was timed, see `timed_calls`

    @property
    def passed(self) -> bool:
        return all(verdict.passed for verdict in self.verdicts.values())


def judge(inputs: Inputs, backend: str) -> dict[str, Verdict]:
    """Hold the fused results against the oracle, with the plain chain as the yardstick."""
    got = testing.fused(inputs, backend)
    oracle, plain = testing.oracle(inputs), testing.plain(inputs)
    return {name: testing.judge(got[name], oracle[name], plain[name]) for name in oracle}


def attends(inputs: Inputs, backend: str) -> dict[str, Attend]:
    """The two sides: tensors by name in, context out. Both find lengths or mask ready."""
    counts = testing.counted(inputs)
    lengths = inputs.masking.memory_lengths
    scaled = {} if inputs.score == "concat" else {"scale": inputs.scale}
    function = getattr(functional, f"{inputs.score}_attention")
    rest = {"memory_lengths": lengths, "backend": backend, **scaled}
    plain = (inputs.scale, counts, inputs.masking)
    return {
        "fused": lambda tensors: function(**tensors, **rest)[0],
        "eager": lambda tensors: testing.plain_attention(inputs.score, tensors, *plain)[0],
    }


def timed_calls(inputs: Inputs, backend: str) -> dict[str, Call]:
    """Forward without gradients, and forward with backward, of both sides."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.tensors.items()}

    def forward(attend: Attend) -> None:
        with torch.no_grad():
            attend(inputs.tensors)

    def both(attend: Attend) -> None:
        torch.autograd.grad(attend(leaves), list(leaves.values()), inputs.grad_context)

    calls: dict[str, Call] = {}
    for side, attend in attends(inputs, backend).items():
        calls[f"{side} forward"] = partial(forward, attend)
        calls[f"{side} both"] = partial(both, attend)
    return calls


def measure(shape: Shape, score: str, backend: str, budget_s: float) -> Measured:
    """Errors first; times only if all of them lie within the budget."""
    inputs = inputs_of(shape, score)
    verdicts = judge(inputs, backend)
    passed = all(verdict.passed for verdict in verdicts.values())
    seconds = medians(timed_calls(inputs, backend), budget_s) if passed else {}
    return Measured(shape, score, verdicts, seconds)


def error_rows(measured: Measured) -> list[list[str]]:
    """One row for each side: errors as a part of the largest value; ! where one is too large."""
    rows = []
    for side in ("fused", "eager"):
        cells = []
        for names in RESULTS.values():
            verdict = next((measured.verdicts[n] for n in names if n in measured.verdicts), None)
            if verdict is None:
                cells.append("")
                continue
            error = verdict.error if side == "fused" else verdict.yardstick
            mark = "!" if side == "fused" and not verdict.passed else ""
            cells.append(f"{error / (verdict.largest or 1.0):.1e}{mark}")
        rows.append([measured.shape.name, measured.score, side, *cells])
    return rows


def speed_row(measured: Measured) -> list[str]:
    cells = []
    for what in ("forward", "both"):
        if not measured.passed:
            cells += [WITHHELD, WITHHELD, ""]
            continue
        fused, eager = (measured.seconds[f"{side} {what}"] for side in ("fused", "eager"))
        cells += [duration(fused), duration(eager), f"{eager / fused:.2f}x"]
    return [measured.shape.name, measured.score, *cells]


def report(results: Sequence[Measured], backend: str) -> str:
    """Both tables, with what they were measured on."""
    chosen = backends.select("cpu", torch.float32, "concat", backend)
    running = next(name for name in backends.BACKENDS if backends.load(name) is chosen)
    errors = [row for measured in results for row in error_rows(measured)]
    speeds = [speed_row(measured) for measured in results]
    shapes = dict.fromkeys(str(measured.shape) for measured in results)
    speed_header = ["shape", "score", "forward: fused", "eager", "speedup"]
    speed_header += ["forward + backward: fused", "eager", "speedup"]
    lines = [
        f"fused (backend {running}) against eager (bmm, masked_fill, softmax, bmm), float32, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}",
        *shapes,
        "",
        "Largest error against float64, as a part of the largest value (d: gradient)",
        render(["shape", "score", "path", *RESULTS], errors, text_columns=3),
        "",
        "Time of one call, projections included: medians of rounds in which both sides take turns",
        render(speed_header, speeds, text_columns=2),
    ]
    if failed := [measured for measured in results if not measured.passed]:
        names = ", ".join(f"{measured.shape.name} {measured.score}" for measured in failed)
        lines += ["", f"FAILED the error budget (!), so no speed is given: {names}"]
    return "\n".join(lines)


def main(arguments: Sequence[str] = (), shapes: Sequence[Shape] = SHAPES) -> int:
    """Print the tables. Returns 1 if a result exceeded the error budget."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks demo", description=summary)
    parser.add_argument("--backend", default="auto", choices=backends.REQUESTS)
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="time to spend on each row, about (default: 2)"
    )
    options = parser.parse_args(arguments)
    results = [
        measure(shape, score, options.backend, options.seconds)
        for shape in shapes
        for score in SCORES
    ]
    print(report(results, options.backend))
    return 0 if all(measured.passed for measured in results) else 1
