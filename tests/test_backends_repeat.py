"""The same input gives the same bits, and no call ever holds a (B, T, S, A) tensor."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from targets import TARGETS, Target, every_target

from fused_attn import backends
from fused_attn.testing import SCORES, Case, Tensors

# Large enough that a backend shares the work among threads, and cuts S into segments.
SIZES = {
    "step": {"batch": 2, "queries": 1, "source": 2000, "memory_dim": 96, "attn_dim": 96},
    "sentence": {"batch": 3, "queries": 33, "source": 300, "memory_dim": 64, "attn_dim": 40},
}
CPU_TARGETS = [target for target in TARGETS if getattr(target, "backend", None) == "cpu"]


def assert_same_bits(got: Tensors, expected: Tensors) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


@every_target
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("score", SCORES)
def test_repeats_bit_for_bit(score: str, size: str, masked: bool, target: Target) -> None:
    if score in ("general", "concat"):  # with the operators of dot and projected
        target.needs_speed()
    options = {"lengths": True, "mask": "cube", "keep": True} if masked else {}
    inputs = target.inputs(Case(score, **SIZES[size], **options))
    first = target.run(inputs)
    for _ in range(1 if target.is_interpreted else 3):
        assert_same_bits(target.run(inputs), first)


@pytest.mark.skipif(not CPU_TARGETS, reason="the cpu backend is not usable here")
@pytest.mark.parametrize("target", CPU_TARGETS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("score", ["dot", "projected"])
def test_threads_change_no_bit(score: str, size: str, dtype: torch.dtype, target: Target) -> None:
    """Of the kernels, that is: general and concat add torch's matrix products, which may."""
    inputs = target.inputs(Case(score, dtype, **SIZES[size], lengths=True, mask="cube"))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(target.run(inputs))
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])


MEASURE_PEAK = """
import torch
from fused_attn import functional
from fused_attn.reference import Masking

def peak():
    with open("/proc/self/status") as status:
        (line,) = (line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

B, T, S, A, E = 4, 128, 2048, 512, 64
parts = [torch.randn(shape, requires_grad=True) for shape in ((B, T, A), (B, S, A), A, (B, S, E))]
query_proj, memory_proj, v, memory = parts
before = peak()
context, weights = functional.attend_concat(
    query_proj, memory_proj, None, v, memory, Masking(), True, "cpu"
)
torch.autograd.backward([context, weights], [torch.ones_like(context), torch.ones_like(weights)])
print((peak() - before) / (4 * B * T * S * A))
"""


@pytest.mark.skipif(not CPU_TARGETS, reason="the cpu backend is not usable here")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_concat_never_holds_a_tensor_of_all_pairs_by_width() -> None:
    """At this size it would be 2 GiB. Inputs, outputs and gradients together are 3% of that."""
    command = [sys.executable, "-c", MEASURE_PEAK]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert float(done.stdout) < 0.05


@pytest.mark.skipif(not CPU_TARGETS, reason="the cpu backend is not usable here")
def test_an_unknown_instruction_set_is_refused() -> None:
    native = backends.load("cpu").native
    before = native.cpu_isa()
    with pytest.raises(ValueError, match=r"name must be one of .*generic.* got 'abacus'"):
        native.set_cpu_isa("abacus")
    assert native.cpu_isa() == before


@pytest.mark.skipif(not CPU_TARGETS, reason="the cpu backend is not usable here")
def test_every_instruction_set_computes_with_its_own_code() -> None:
    """Different code rounds differently: equal bits of two would mean that one ran for both."""
    if len(CPU_TARGETS) < 2:
        pytest.skip("this machine has one instruction set")
    # Without the instruction that multiplies pairs of bfloat16, AVX-512 has one way for float32.
    cases = [Case("projected", **SIZES["sentence"])]
    cases.append(Case("dot", torch.bfloat16, **SIZES["sentence"]))
    contexts = [[t.run(t.inputs(case))["context"].float() for case in cases] for t in CPU_TARGETS]
    bits = {b"".join(context.numpy().tobytes() for context in found) for found in contexts}
    assert len(bits) == len(CPU_TARGETS)
