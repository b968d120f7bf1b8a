"""Recording what the device is told to do, and doing it again without Python.

A step of a decoder is some thirty kernels that are each done before Python has asked for the next
one. A graph of them is one launch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from threading import Lock
from typing import ClassVar, Protocol

import torch
from torch import Tensor

# The first calls choose algorithms and get their workspaces, which no capture may do.
_WARM_UPS = 2

Work = Callable[[], tuple[Tensor, ...]]


class Graph(Protocol):
    """Work that was recorded. It reads and writes the memory that it read and wrote then."""

    outputs: tuple[Tensor, ...]  # what the work returned; a replay fills the same tensors again

    def replay(self) -> None:
        """Do it again, in the order of the current stream."""


class Recorder(Protocol):
    """Records work for one device; what it records shares memory that nobody needs in between."""

    def capture(self, work: Work) -> Graph:
        """Record ``work``, which is run several times for that.

        Raises RuntimeError if it does what cannot be recorded, such as waiting for the device.
        """


class CudaGraph:
    """A CUDA graph."""

    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: tuple[Tensor, ...]) -> None:
        self._graph = graph
        self.outputs = outputs

    def replay(self) -> None:
        self._graph.replay()


@cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """Of all recorders of a device, to warm up and to capture on: libraries keep a workspace for
    every stream, and one that a capture uses must have been allocated by a capture.
    """
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


class CudaRecorder:
    """Captures CUDA graphs, of which only one runs at a time: they share one pool of memory."""

    _lock = Lock()  # a process captures one graph at a time
    _failed: ClassVar[list[torch.cuda.CUDAGraph]] = []  # the allocator may still ask them

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, work: Work) -> CudaGraph:
        # Not `torch.cuda.graph`: it first gives all cached memory back, for the next batch to
        # allocate again.
        with torch.cuda.device(self._device), self._lock:
            current, (side, capturing) = torch.cuda.current_stream(), _streams(self._device)
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    work()
            capturing.wait_stream(side)
            with torch.cuda.stream(capturing):
                graph, outputs = self._captured(work)
            current.wait_stream(capturing)
        return CudaGraph(graph, outputs)

    def _captured(self, work: Work) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
        graph = torch.cuda.CUDAGraph()
        # What other threads do with the device is no matter of this capture.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            outputs = work()
        except BaseException:
            with suppress(RuntimeError):  # it says again that the capture has failed
                graph.capture_end()
            self._abandon(graph)
            raise
        try:
            graph.capture_end()
        except RuntimeError:
            self._abandon(graph)
            raise
        return graph, outputs

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Let the allocator do what the end of a capture that failed has left undone."""
        self._failed.append(graph)
        index = self._device.index or 0
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(index, self._pool)
            torch._C._cuda_releasePool(index, self._pool)


# Of each type of device that has such graphs.
RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}
