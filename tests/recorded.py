"""A stand-in for graphs on the CPU, which holds what it replays to what a device would do.

A graph on a device reads and writes the addresses that it was captured with, and no number that
Python has computed since. Here the work runs again in Python, and every operator must have the same
numbers and the same tensors from outside as at the capture.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fused_attn.seq2seq.search.graphs import Work

# Of which a device cannot know the result, or its size, without the host.
_WAITS = {
    getattr(torch.ops.aten, name).default
    for name in ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select")
}


class Calls(TorchDispatchMode):
    """Notes every operator, with its numbers and with the addresses that come from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self._made: list[Tensor] = []  # alive, so that no address comes twice
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in _WAITS:
            raise RuntimeError(f"{function} is not permitted when a stream is capturing")
        self.calls.append((function, *map(self._noted, pytree.tree_leaves((args, kwargs)))))
        found = function(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._made.append(leaf)
                self._known.add(id(leaf))
        return found

    def _noted(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return repr(leaf)
        place = "made" if id(leaf) in self._known else leaf.data_ptr()
        return place, tuple(leaf.shape), leaf.dtype


class FakeGraph:
    def __init__(self, work: Work, checks: bool) -> None:
        work()
        self._work = work
        with Calls() as calls:
            found = work()
        with torch.inference_mode(False):  # as those of a device, which fill themselves
            self.outputs = tuple(tensor.clone() for tensor in found)
        self._calls, self._checks = calls.calls, checks
        self.replays = 0

    def replay(self) -> None:
        for tensor in self.outputs:
            tensor.fill_(torch.nan)
        calls = Calls()
        with calls if self._checks else nullcontext():
            found = self._work()
        assert not self._checks or calls.calls == self._calls
        for tensor, new in zip(self.outputs, found, strict=True):
            tensor.copy_(new)
        self.replays += 1


class FakeRecorder:
    """Counts: it keeps all that it has captured, but for what a test lets go.

    checks: whether replays are compared with the capture. It makes torch take other ways through
        some operators, whose results differ in the last bit.
    """

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"
        self.graphs: list[FakeGraph] = []
        self.tries = 0
        self.checks = True

    def __call__(self, device: torch.device) -> FakeRecorder:
        return self

    @property
    def replays(self) -> int:
        return sum(graph.replays for graph in self.graphs)

    def capture(self, work: Work) -> FakeGraph:
        self.tries += 1
        self.graphs.append(FakeGraph(work, self.checks))
        return self.graphs[-1]
