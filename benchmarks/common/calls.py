"""The calls behind a row, fused and eager, and the judgement of what they return.

Both sides find their operands ready: lengths that say S for every row, so that nobody gains from
padding; the same as a boolean mask for eager; projections too, where the row has them finished.

What is judged is the fused call as it is timed, at its whole size. The float64 oracle of a concat
call would build (B, T, S, A) in gigabytes, so it takes only some rows of the batch and some of
their queries: the context is compared there, and the gradient that comes back is 0 everywhere else,
which makes the gradient of every input that of the part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.common import machine
from benchmarks.common.measure import Call
from benchmarks.targets.cpu.rows import Row
from fused_attn import functional, testing
from fused_attn.prepared import exponentials
from fused_attn.reference import LocalWindow, Masking
from fused_attn.testing import Case, Inputs, Tensors, Verdict

Attend = Callable[[Tensors], Tensor]
BATCHED = ("query", "query_proj", "memory", "memory_proj")
PER_QUERY = ("context", "query", "query_proj")
JUDGED_ROWS = 2  # of the batch, of a call that is judged in part
JUDGED_ELEMENTS = 1 << 22  # of (B, T, S, A): 32 MiB in float64, several times over


def inputs_of(row: Row) -> Inputs:
    """Random inputs of the row, at scale 1 and with every position counting."""
    batch, queries, source, width = row.sizes
    case = Case(
        row.score, row.dtype, batch, queries, source,
        query_dim=width, memory_dim=row.memory_dim or width, attn_dim=width, weights=False,
    )  # fmt: skip
    inputs = testing.make_inputs(case)
    if row.window is not None:
        local = LocalWindow(torch.rand(batch, queries) * source, row.window)
        inputs = replace(inputs, masking=inputs.masking._replace(window=local))
    return replace(with_lengths(inputs, torch.full((batch,), source)), scale=1.0)


def with_lengths(inputs: Inputs, lengths: Tensor) -> Inputs:
    """The same inputs, of which the first ``lengths`` (B,) positions count."""
    return replace(inputs, masking=inputs.masking._replace(memory_lengths=lengths))


def fused(row: Row, inputs: Inputs, backend: str = "cpu") -> Attend:
    """Our side: tensors by name in, context out."""
    lengths = inputs.masking.memory_lengths
    rest = {"memory_lengths": lengths, "backend": backend}
    if row.score == "dot":
        window = inputs.masking.window
        return lambda t: functional.dot_attention(t["query"], t["memory"], window=window, **rest)[0]
    if row.score == "general":
        return lambda t: functional.general_attention(t["query"], t["memory"], t["weight"], **rest)[
            0
        ]
    if row.score == "concat":
        return lambda t: functional.concat_attention(
            t["query"], t["memory"], t["query_weight"], t["memory_weight"], t["v"], **rest
        )[0]
    ready = exponentials(inputs.tensors["memory_proj"]) if row.prepared else None
    masking = Masking(lengths)
    return lambda t: functional.attend_concat(
        t["query_proj"], t["memory_proj"], ready, t["v"], t["memory"], masking, False, backend
    )[0]


def eager(row: Row, inputs: Inputs) -> Attend:
    """What people write: bmm, or tanh of the sums times v; then masked_fill, softmax, bmm."""
    hidden = ~testing.counted(inputs)
    lowest = torch.finfo(row.dtype).min

    def chain(scores: Tensor, memory: Tensor) -> Tensor:
        weights = torch.softmax(scores.masked_fill(hidden, lowest), dim=-1)
        return torch.bmm(weights, memory)

    def dot(query: Tensor, memory: Tensor) -> Tensor:
        return chain(torch.bmm(query, memory.transpose(1, 2)), memory)

    def concat(query: Tensor, keys: Tensor, v: Tensor, memory: Tensor) -> Tensor:
        return chain(torch.tanh(query[:, :, None] + keys[:, None]) @ v, memory)

    if row.score == "dot":
        return lambda t: dot(t["query"], t["memory"])
    if row.score == "general":
        return lambda t: dot(t["query"] @ t["weight"], t["memory"])
    if row.score == "concat":
        return lambda t: concat(
            linear(t["query"], t["query_weight"]),
            linear(t["memory"], t["memory_weight"]),
            t["v"],
            t["memory"],
        )
    return lambda t: concat(t["query_proj"], t["memory_proj"], t["v"], t["memory"])


def call_of(row: Row, inputs: Inputs, attend: Attend) -> Call:
    """One call as it is timed. The caller switches gradients off for a forward."""
    if not row.backward:
        return partial(attend, inputs.tensors)
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.tensors.items()}
    wanted = list(leaves.values())
    return lambda: torch.autograd.grad(attend(leaves), wanted, inputs.grad_context)


def in_turn(calls: Sequence[Call]) -> Call:
    """A call that runs the next one of ``calls`` each time."""
    turn = cycle(calls)
    return lambda: next(turn)()


def timed(row: Row, inputs: Inputs, *sides: Callable[[Row, Inputs], Attend]) -> list[Call]:
    """The calls of ``sides``, as they are timed.

    A share of the read bandwidth means memory that no cache holds: such a row takes turns with
    copies of its inputs, which together are as large as what the machine's own figure is read from.
    """
    every = [inputs]
    if row.second is not None and row.second.kind == "read":
        for _ in range(machine.READ_BYTES // row.read_bytes):
            tensors = {name: tensor.clone() for name, tensor in inputs.tensors.items()}
            every.append(replace(inputs, tensors=tensors))
    return [in_turn([call_of(row, each, side(row, each)) for each in every]) for side in sides]


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
        if name in PER_QUERY:
            return tensor[self.rows, self.queries]
        return tensor[self.rows] if name in BATCHED else tensor

    def place(self, name: str, tensor: Tensor, whole: Tensor) -> Tensor:
        """The opposite of `take`, with 0 in the rest of the shape of ``whole``."""
        if name not in BATCHED:
            return tensor
        placed = torch.zeros(whole.shape, dtype=tensor.dtype, device=whole.device)
        self.take(name, placed).copy_(tensor)
        return placed

    def inputs(self, inputs: Inputs) -> Inputs:
        tensors = {name: self.take(name, t) for name, t in inputs.tensors.items()}
        lengths = inputs.masking.memory_lengths[self.rows]
        grad_context = self.take("context", inputs.grad_context)
        part = replace(inputs, tensors=tensors, grad_context=grad_context)
        return with_lengths(part, lengths)


def results(row: Row, inputs: Inputs, attend: Attend) -> Tensors:
    """What a call returns, by name: the context, and the gradients if the row has them."""
    if row.backward:
        return testing.evaluate(lambda tensors: (attend(tensors), None), inputs)
    with torch.no_grad():
        return {"context": attend(inputs.tensors)}


def judge(row: Row, inputs: Inputs) -> dict[str, Verdict]:
    """Hold the fused results against the oracle, with the eager chain as the yardstick."""
    at = Part.of(row)
    part = at.inputs(inputs)
    seed = torch.zeros_like(inputs.grad_context)
    at.take("context", seed).copy_(part.grad_context)
    whole = replace(inputs, grad_context=seed)
    got = results(row, whole, fused(row, whole))
    oracle, plain = testing.oracle(part), results(row, part, eager(row, part))
    return {name: verdict_of(name, at, got, oracle, plain) for name in got}


def verdict_of(name: str, at: Part, got: Tensors, oracle: Tensors, plain: Tensors) -> Verdict:
    if name == "context":
        return testing.judge(at.take(name, got[name]), oracle[name], plain[name])
    argument = name.removeprefix("grad_")
    right, written = (at.place(argument, side[name], got[name]) for side in (oracle, plain))
    return testing.judge(got[name], right, written)
