"""The peak memory of concat forward and backward is a small multiple of their inputs."""

from __future__ import annotations

import subprocess
import sys

import pytest
from targets import TARGETS

CPU_TARGETS = [target for target in TARGETS if getattr(target, "backend", None) == "cpu"]

# Runs in its own process, because the peak is per process. The inputs are created first, so that
# the memory used to draw them is not counted.
MEASURE = """
import torch
from fused_attn import concat_attention

def read(name):
    with open("/proc/self/status") as status:
        (line,) = (line for line in status if line.startswith(name))
    return int(line.split()[1]) * 1024

B, T, S, D = 8, 96, 1024, 512
shapes = {"query": (B, T, D), "memory": (B, S, D), "query_weight": (D, D),
          "memory_weight": (D, D), "v": (D,)}
inputs = {name: torch.full(shape, 0.01, requires_grad=True) for name, shape in shapes.items()}
size = sum(tensor.numel() * tensor.element_size() for tensor in inputs.values())
before = read("VmRSS")
context, _ = concat_attention(**inputs, backend="cpu")
context.backward(torch.ones_like(context))
assert all(tensor.grad.isfinite().all() for tensor in inputs.values())
print((read("VmHWM") - before) / size)
"""


@pytest.mark.skipif(not CPU_TARGETS, reason="the cpu backend is not usable here")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_concat_with_its_projections_holds_less_than_12_times_its_inputs() -> None:
    """Eager attention holds several tensors (B, T, S, A), each 80 times the size of the inputs."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 12
