"""Rows that are split among programs, and strides that do not fit 32 bits."""

from __future__ import annotations

import mmap

import pytest
import torch
from targets import Target, every_target
from torch import Tensor

from fused_attn import functional

# One query and several; rows that one program has whole, and rows that are split.
SHAPES = [(1, 40), (1, 700), (3, 700), (17, 40), (17, 300)]


@every_target
@pytest.mark.parametrize("size", [1.0, 1e2, 1e4, 1e6], ids=lambda size: f"{size:g}")
@pytest.mark.parametrize(("queries", "source"), SHAPES, ids=str)
def test_weights_of_large_scores_sum_to_one(
    queries: int, source: int, size: float, target: Target
) -> None:
    """The logarithm of a sum of exponentials of 1e6 is rounded to 0.06: no weight may use it."""
    generator = torch.Generator().manual_seed(source)
    memory = torch.randn(2, source, 32, generator=generator)
    memory[..., 0] = 1.0
    query = torch.zeros(2, queries, 32)
    query[..., 0] = size  # the same for every position, so that several keep a share
    query[..., 1] = 2.0
    with target.active():
        context, weights = functional.dot_attention(
            query.to(target.device),
            memory.to(target.device),
            return_weights=True,
            backend=target.backend,
        )
    sums = weights.double().sum(-1).cpu()
    assert (sums - 1).abs().max() <= 1e-6
    rounded = (query.double() @ memory.double().mT).float().double()  # what float32 can tell apart
    expected = torch.softmax(rounded, -1) @ memory.double()
    # A score of 1e6 is a multiple of 1/16, however it is summed.
    coarse = 4 * size * torch.finfo(torch.float32).eps
    assert (context.double().cpu() - expected).abs().max() <= 1e-5 + 4 * coarse


def reserved(elements: int, dtype: torch.dtype) -> Tensor:
    """Addresses for so many elements; only those that are written take memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        room = mmap.mmap(-1, elements * dtype.itemsize, flags=flags)
    except OSError as error:
        pytest.skip(f"no room for {elements} elements: {error}")
    return torch.frombuffer(room, dtype=dtype, count=elements)


@every_target
@pytest.mark.parametrize("stride", [2**31 - 8, 2**31, 2**31 + 8, 2**31 + 1], ids=str)
@pytest.mark.parametrize("queries", [1, 3])
def test_batches_that_lie_far_apart(queries: int, stride: int, target: Target) -> None:
    """A batch stride of 2^31 elements: every row of the batch is found, forward and backward."""
    if target.device != "cpu" and torch.cuda.mem_get_info()[0] < 3 * 2**32:
        pytest.skip("the GPU has too little memory for such a stride")
    dtype, source, width = torch.float16, 19, 16
    room = stride + source * width
    if target.device == "cpu":
        storage = reserved(room, dtype)
    else:
        storage = torch.empty(room, dtype=dtype, device=target.device)
    generator = torch.Generator().manual_seed(0)
    near = torch.randn(2, source, width, generator=generator).to(dtype)
    far = storage.as_strided((2, source, width), (stride, width, 1))
    far.copy_(near)
    query = torch.randn(2, queries, width, generator=generator).to(dtype).to(target.device)
    near = near.to(target.device)
    found = []
    for memory in (far, near):
        memory = memory.detach().requires_grad_()
        asked = query.clone().requires_grad_()
        with target.active():
            context, weights = functional.dot_attention(
                asked, memory, return_weights=True, backend=target.backend
            )
            context.float().square().sum().backward()
        found.append([x.detach().clone() for x in (context, weights, asked.grad, memory.grad)])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-3)
