"""Forward and backward of the concat score hold a small multiple of their inputs."""

from __future__ import annotations

import subprocess
import sys

import pytest
from targets import TARGETS

CPU_TARGETS = [target for target in TARGETS if getattr(target, "backend", None) == "cpu"]

# In a process of its own, or the peak would be that of an earlier test. The inputs are there
# before; what they needed while they were drawn is no part of the call.
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
    """The eager chain holds (B, T, S, A) several times: 80 times the inputs each."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 12
