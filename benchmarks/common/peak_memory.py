"""Growth of a fresh process over one forward and backward of concat attention, in bytes.

Run as a script, `peak_memory.py B T S D THREADS`, because a process that did other things before
has a peak of its own. Reads /proc, so Linux only.
"""

from __future__ import annotations

import sys

import torch

from fused_attn import concat_attention


def memory_of_process(field: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS, what is held now; VmHWM, the most so far."""
    with open("/proc/self/status", encoding="ascii") as status:
        (line,) = (line for line in status if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def growth(batch: int, queries: int, source: int, width: int) -> int:
    shapes = ((batch, queries, width), (batch, source, width), (width, width), (width, width))
    inputs = [torch.randn(shape, requires_grad=True) for shape in (*shapes, (width,))]
    grad_context = torch.randn(shapes[0])
    before = memory_of_process("VmRSS")
    context, _ = concat_attention(*inputs, backend="cpu")
    torch.autograd.grad(context, inputs, grad_context)
    return memory_of_process("VmHWM") - before


if __name__ == "__main__":
    *sizes, threads = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    print(growth(*sizes))
