"""The calls that are timed: inputs, operands prepared beforehand, and calls without arguments.

All sides receive their operands ready to use. Lengths say S for every row, so that no side gains
from padding; sides that need a boolean mask receive the lengths as a mask. Projections are made
beforehand too, for rows that take finished projections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from benchmarks.common.measure import Call
from benchmarks.common.problems import Row
from fused_attn import testing
from fused_attn.prepared import exponentials
from fused_attn.reference import LocalWindow
from fused_attn.testing import Case, Inputs, Tensors

Results = tuple[Tensor, Tensor | None]  # the context; the weights, if they are asked for
Attend = Callable[[Tensors], Results]


def inputs_of(row: Row) -> Inputs:
    """Random inputs of the row on the CPU, at scale 1 and with every position counting."""
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
    """The same inputs with ``lengths`` (B,): the number of positions that count in each row."""
    return replace(inputs, masking=inputs.masking._replace(memory_lengths=lengths))


def on_device(inputs: Inputs, device: str) -> Inputs:
    """The same inputs on ``device``."""
    if device == "cpu":
        return inputs
    tensors = {name: tensor.to(device) for name, tensor in inputs.tensors.items()}
    lengths = inputs.masking.memory_lengths
    masking = inputs.masking._replace(
        memory_lengths=None if lengths is None else lengths.to(device)
    )
    grad = inputs.grad_context.to(device)
    return replace(inputs, tensors=tensors, masking=masking, grad_context=grad)


def copies_of(inputs: Inputs, count: int) -> list[Inputs]:
    """``inputs`` and ``count - 1`` copies with their own memory, so that caches miss."""
    found = [inputs]
    for _ in range(count - 1):
        tensors = {name: tensor.clone() for name, tensor in inputs.tensors.items()}
        found.append(replace(inputs, tensors=tensors))
    return found


def prepared(row: Row, tensors: Tensors) -> Tensors:
    """The tensors, with what a decoder keeps between its steps if the row is prepared."""
    if not row.prepared:
        return tensors
    return tensors | {"memory_exp": exponentials(tensors["memory_proj"])}


def call_of(row: Row, inputs: Inputs, attend: Attend) -> Call:
    """One call as it is timed. For a forward the caller switches gradients off."""
    if not row.backward:
        return partial(attend, prepared(row, inputs.tensors))
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.tensors.items()}
    wanted = list(leaves.values())
    return lambda: torch.autograd.grad(attend(leaves)[0], wanted, inputs.grad_context)


def in_turn(calls: Sequence[Call]) -> Call:
    """A call that runs the next one of ``calls`` each time."""
    turn = cycle(calls)
    return lambda: next(turn)()


def synchronised(call: Callable[[], object]) -> Call:
    """The call, which then waits for all that it has launched on the GPU."""

    def wait() -> None:
        call()
        torch.cuda.synchronize()

    return wait
