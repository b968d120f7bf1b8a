"""Recording what the device is told to do, and doing it again without Python.

A step of a decoder is some thirty kernels that are each done before Python has asked for the next
one. A graph of them is one launch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

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


class CudaRecorder:
    """Captures CUDA graphs, of which only one runs at a time: they share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def capture(self, work: Work) -> CudaGraph:
        # Not `torch.cuda.graph`: it first gives all cached memory back, for the next batch to
        # allocate again.
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UPS):
                    work()
                graph, outputs = self._captured(work)
            current.wait_stream(self._stream)
        return CudaGraph(graph, outputs)

    def _captured(self, work: Work) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
        graph = torch.cuda.CUDAGraph()
        # What other threads do with the device is no matter of this capture.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            outputs = work()
        except BaseException:
            with suppress(RuntimeError):  # it says again that the capture failed
                graph.capture_end()
            raise
        graph.capture_end()
        return graph, outputs


# Of each type of device that has such graphs.
RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}
