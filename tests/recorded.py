"""A stand-in for CUDA graphs on the CPU, which checks that work could be replayed on a device.

A CUDA graph reads and writes the addresses of its capture, and does not see numbers that Python
computes later. Here a replay runs the work again in Python and checks that every operator gets the
same numbers and the same outside tensors as in the capture.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fused_attn.seq2seq.search.graphs import Work

# Operators whose result, or its size, the host needs. They cannot be captured.
_WAITS = {
    getattr(torch.ops.aten, name).default
    for name in ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select")
}


class Calls(TorchDispatchMode):
    """Records every operator, with its numbers and with the addresses of outside tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self._made: list[Tensor] = []  # kept alive, so that no address is reused
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
        with torch.inference_mode(False):  # like the static outputs of a real graph
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
    """Counts captures and replays, and keeps all graphs until a test deletes them.

    checks: whether replays are compared with the capture. The comparison makes torch use other code
        paths for some operators, and their results may differ in the last bit.
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
