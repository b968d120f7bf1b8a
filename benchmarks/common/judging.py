"""How a side's results are judged: against float64, with the eager chain as the yardstick.

The call is judged at its full size, as it is timed. The float64 oracle of a concat call would need
gigabytes for (B, T, S, A), so it computes some rows of the batch and some of their queries only.
The context is compared there. The incoming gradient is 0 everywhere else, so that the gradients of
the inputs come from that part alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.common.calls import Attend, prepared
from benchmarks.common.problems import Row
from benchmarks.common.sides import eager, fused
from fused_attn import testing
from fused_attn.testing import Inputs, Tensors, Verdict

PER_QUERY = ("context", "weights", "query", "query_proj")
BATCHED = (*PER_QUERY, "memory", "memory_proj")
JUDGED_ROWS = 2  # rows of the batch, of a call that is judged in part
JUDGED_ELEMENTS = 1 << 22  # elements of (B, T, S, A): 32 MiB in float64, held several times


@dataclass(frozen=True)
class Part:
    """The rows of the batch and the queries that the oracle computes."""

    rows: slice
    queries: slice

    @classmethod
    def of(cls, row: Row) -> Part:
        """Everything, or as much of a concat call as the oracle has room for, spread evenly."""
        batch, queries, source, width = row.sizes
        if row.problem.concat_elements <= JUDGED_ELEMENTS:
            return cls(slice(None), slice(None))
        rows = min(batch, JUDGED_ROWS)
        wanted = max(1, JUDGED_ELEMENTS // (rows * source * width))
        step = -(-queries // wanted)
        return cls(slice(0, None, -(-batch // rows)), slice(step // 2, None, step))

    def take(self, name: str, tensor: Tensor) -> Tensor:
        """The part of a result, an input or its gradient."""
        name = name.removeprefix("grad_")
        if name in PER_QUERY:
            return tensor[self.rows, self.queries]
        return tensor[self.rows] if name in BATCHED else tensor

    def place(self, name: str, tensor: Tensor, whole: Tensor) -> Tensor:
        """The inverse of `take`: 0 in the rest of the shape of ``whole``."""
        if name.removeprefix("grad_") not in BATCHED:
            return tensor
        placed = torch.zeros(whole.shape, dtype=tensor.dtype, device=whole.device)
        self.take(name, placed).copy_(tensor)
        return placed

    def inputs(self, inputs: Inputs) -> Inputs:
        """The inputs of the part alone."""
        masking, weights = inputs.masking, inputs.grad_weights
        if masking.memory_lengths is not None:
            masking = masking._replace(memory_lengths=masking.memory_lengths[self.rows])
        if masking.window is not None:
            centers = masking.window.centers[self.rows, self.queries]
            masking = masking._replace(window=masking.window._replace(centers=centers))
        return replace(
            inputs,
            tensors={name: self.take(name, t) for name, t in inputs.tensors.items()},
            masking=masking,
            grad_context=self.take("context", inputs.grad_context),
            grad_weights=None if weights is None else self.take("weights", weights),
        )


def results(row: Row, inputs: Inputs, attend: Attend) -> Tensors:
    """What a call returns, by name: context, weights if asked for, gradients if it has them."""
    if row.backward:
        return testing.evaluate(attend, inputs)
    with torch.no_grad():
        context, weights = attend(prepared(row, inputs.tensors))
    return {"context": context} | ({} if weights is None else {"weights": weights})


class Judge:
    """The oracle and the yardstick of a row, for all of its sides."""

    def __init__(self, row: Row, inputs: Inputs) -> None:
        self.row = row
        self.part = Part.of(row)
        part = self.part.inputs(inputs)
        seed = torch.zeros_like(inputs.grad_context)
        self.part.take("context", seed).copy_(part.grad_context)
        self.whole = replace(inputs, grad_context=seed)
        self.oracle = testing.oracle(part)
        self.plain = results(row, part, eager(row, part))

    def results(self, attend: Attend) -> Tensors:
        """What a side returns to the whole call."""
        return results(self.row, self.whole, attend)

    def verdicts(self, got: Tensors) -> dict[str, Verdict]:
        """The verdict on each of the `results`."""
        return {name: self._verdict(name, got[name]) for name in got}

    def _verdict(self, name: str, got: Tensor) -> Verdict:
        right, written = self.oracle[name], self.plain[name]
        if name == "context":
            return testing.judge(self.part.take(name, got), right, written)
        right, written = (self.part.place(name, side, got) for side in (right, written))
        return testing.judge(got, right, written)


def judge_fused(row: Row, inputs: Inputs) -> dict[str, Verdict]:
    """The verdict on each result of the fused call on the CPU."""
    judge = Judge(row, inputs)
    return judge.verdicts(judge.results(fused(row, judge.whole)))


def relative_errors(verdicts: Mapping[str, Verdict]) -> dict[str, float]:
    """The errors as shares of the largest value of the oracle."""
    return {name: found.error / (found.largest or 1.0) for name, found in verdicts.items()}


def wrong_names(verdicts: Mapping[str, Verdict]) -> tuple[str, ...]:
    """The results that exceeded their error budget."""
    return tuple(name for name, found in verdicts.items() if not found.passed)
