"""Capture device work as a graph, and replay it without Python.

A decoder step is about thirty kernels, each of which finishes before Python launches the next one.
A graph of them takes one launch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from threading import Lock
from typing import ClassVar, Protocol

import torch
from torch import Tensor

# The first calls choose algorithms and allocate workspaces, which is not allowed in a capture.
_WARM_UPS = 2

Work = Callable[[], tuple[Tensor, ...]]


class Graph(Protocol):
    """Captured work. A replay reads and writes the same memory as the capture."""

    outputs: tuple[Tensor, ...]  # the return value of the work; a replay overwrites these tensors

    def replay(self) -> None:
        """Repeat the work on the current stream."""


class Recorder(Protocol):
    """Captures graphs for one device. The graphs share their temporary memory."""

    def capture(self, work: Work) -> Graph:
        """Capture ``work``, which is called several times for that.

        Raises RuntimeError if the work cannot be captured, for example if it synchronizes.
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
    """The streams for warm-up and for capture, shared by all recorders of a device.

    There are two because libraries keep a workspace per stream, and a workspace that a capture uses
    must have been allocated during a capture.
    """
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


class CudaRecorder:
    """Captures CUDA graphs that share one memory pool, so only one of them may run at a time."""

    _lock = Lock()  # one capture at a time in a process
    # Failed captures are kept, because the allocator may still refer to them.
    _failed: ClassVar[list[torch.cuda.CUDAGraph]] = []

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, work: Work) -> CudaGraph:
        # Not `torch.cuda.graph`: it first releases all cached memory, which the next batch would
        # have to allocate again.
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
        # "thread_local": device calls of other threads do not break this capture.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            outputs = work()
        except BaseException:
            with suppress(RuntimeError):  # reports the failed capture once more
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
        """Release the allocator state that a failed capture leaves behind."""
        self._failed.append(graph)
        index = self._device.index or 0
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(index, self._pool)
            torch._C._cuda_releasePool(index, self._pool)


# The recorder of each device type that supports graphs.
RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}
