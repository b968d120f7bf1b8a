"""Peak memory of a call in bytes: of a process on the CPU, of the allocator on a GPU.

``peak_memory.py B T S D THREADS``, as a script, prints the growth of a fresh process over one
forward and backward of concat attention: a process that did other work has a peak of its own.
The CPU functions read /proc, so they need Linux.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from fused_attn import concat_attention


def memory_of_process(field: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS, held now; VmHWM, the most so far."""
    with open("/proc/self/status", encoding="ascii") as status:
        (line,) = (line for line in status if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def process_growth(call: Callable[[], object]) -> int:
    """The peak of this process after the call, above what it held before. Once per process."""
    before = memory_of_process("VmRSS")
    call()
    return memory_of_process("VmHWM") - before


def allocated_growth(call: Callable[[], object]) -> int:
    """The peak of what torch allocates on the GPU during the call, above what it held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def concat_growth(batch: int, queries: int, source: int, width: int) -> int:
    """`process_growth` of a forward and backward of concat attention with all projections."""
    shapes = ((batch, queries, width), (batch, source, width), (width, width), (width, width))
    inputs = [torch.randn(shape, requires_grad=True) for shape in (*shapes, (width,))]
    grad_context = torch.randn(shapes[0])

    def both() -> None:
        context, _ = concat_attention(*inputs, backend="cpu")
        torch.autograd.grad(context, inputs, grad_context)

    return process_growth(both)


if __name__ == "__main__":
    *sizes, threads = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    print(concat_growth(*sizes))
