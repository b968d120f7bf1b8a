"""What the Triton backend asks of its kernels: precision, units, launches by shape alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

import tiles
from fused_attn.kernels.launch import Chip

from fused_attn.backends.triton import backward, call, forward
from fused_attn.reference import Masking
from fused_attn.testing import Case

H200 = Chip(132, 232448)


@pytest.fixture
def tf32() -> Iterator[object]:
    """torch's setting for float32 products, put back afterwards."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    yield settings
    settings.fp32_precision = before


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def made(query: torch.Tensor, memory: torch.Tensor) -> call.Call:
    with call.recording(H200):
        return call.Call(query, memory, Masking(), "dot")


def test_float32_products_follow_torch(tf32: object) -> None:
    single = [meta(2, 3, 8, dtype=torch.float32), meta(2, 5, 8, dtype=torch.float32)]
    short = [meta(2, 3, 8), meta(2, 5, 8)]
    for setting, expected in (("ieee", "ieee"), ("tf32", "tf32")):
        tf32.fp32_precision = setting
        assert made(*single).precision["PRECISION"] == expected
        assert made(*short).precision["PRECISION"] == "ieee"  # of 16-bit types it says nothing


@pytest.mark.parametrize(
    ("dtype", "width", "row", "unit"),
    [
        (torch.bfloat16, 1000, 1000, 8),
        (torch.float16, 512, 520, 8),
        (torch.float32, 36, 36, 4),
        (torch.bfloat16, 36, 36, 1),
        (torch.bfloat16, 512, 513, 1),
    ],
    ids=str,
)
def test_units_divide_widths_and_strides(
    dtype: torch.dtype, width: int, row: int, unit: int
) -> None:
    memory = meta(2, 5, row, dtype=dtype)[:, :, :width]
    found = made(meta(2, 3, width, dtype=dtype), memory)
    assert found.unit == {"UNIT": unit}
    assert found.widths == (width // unit, width // unit)
    assert found.strides(memory) == [5 * row // unit, row // unit]


@pytest.mark.parametrize(("queries", "source"), [(1, 1024), (8, 1024), (64, 1024), (50, 50)])
@pytest.mark.parametrize("score", ["dot", "concat"])
def test_a_graph_can_capture_what_is_launched(score: str, queries: int, source: int) -> None:
    """Lengths are data: on a device that has none, nothing fails, and nothing else is launched."""
    query, memory, v = meta(4, queries, 64), meta(4, source, 64), meta(64)
    saved = (meta(4, queries, 64), None, meta(4, queries, dtype=torch.float32))
    found = []
    for lengths in (None, meta(4, dtype=torch.int64)):
        masking = Masking(lengths)
        with call.recording(H200) as launches:
            if score == "dot":
                forward.dot(query, memory, 1.0, masking, True, True)
                backward.dot(query, None, query, memory, 1.0, masking, saved, [True] * 3)
            else:
                forward.concat(query, memory, None, v, memory, masking, True, True)
                operands = (query, memory, v, memory)
                backward.concat(query, None, *operands, masking, saved, [True] * 5)
        found.append([(one.kernel.__name__, one.programs, one.options) for one in launches])
    assert found[0] == found[1]
    assert 2 <= len(found[0]) <= 10
    assert all(programs > 0 for _, grid, _ in found[0] for programs in grid)


# Batches that people train on: (B, T, S, D).
TRAINING = [
    (64, 64, 1024, 512), (64, 64, 1024, 1024), (64, 50, 50, 512), (128, 10, 128, 1024),
    (64, 64, 512, 512), (32, 40, 200, 512), (16, 30, 300, 1000), (64, 40, 100, 384),
]  # fmt: skip
SMALL_WORK = ("merge_forward", "merge_alone", "concat_exponentials", "weight_deltas")


@pytest.mark.parametrize("sizes", TRAINING, ids=str)
@pytest.mark.parametrize("score", ["dot", "concat"])
def test_a_training_step_fills_the_chip(score: str, sizes: tuple[int, ...]) -> None:
    """At most a tenth of the multiprocessors is without a program while the others work."""
    batch, queries, source, width = sizes
    query, memory, v = meta(batch, queries, width), meta(batch, source, width), meta(width)
    saved = (query, None, meta(batch, queries, dtype=torch.float32))
    with call.recording(H200) as launches:
        if score == "dot":
            forward.dot(query, memory, 1.0, Masking(), False, True)
            backward.dot(query, None, query, memory, 1.0, Masking(), saved, [True] * 3)
        else:
            forward.concat(query, memory, None, v, memory, Masking(), False, True)
            operands = (query, memory, v, memory)
            backward.concat(query, None, *operands, Masking(), saved, [True] * 5)
    for one in launches:
        if one.kernel.__name__ not in SMALL_WORK:
            assert one.programs[0] >= 0.9 * H200.multiprocessors, one.kernel.__name__


LARGE = [
    Case("dot", torch.bfloat16, 65536, 64, 1024, 1024, 1024, weights=True),
    Case("dot", torch.bfloat16, 1, 65536, 65536, 1024, 1024, weights=True),
    Case("dot", torch.bfloat16, 1, 1, 2**30, 16, 16, weights=True),
    Case("dot", torch.float32, 131072, 4, 512, 2048, 2048, weights=True),
    Case("projected", torch.bfloat16, 4096, 128, 8192, 512, 512, 512, weights=True),
    Case("projected", torch.float32, 1, 65536, 65536, 512, 512, 512, mask="cube"),
    Case("projected", torch.float32, 16384, 512, 600, 512, 512, 512, window="gaussian"),
]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_programs_fit_in_the_first_dimension_of_a_launch(case: Case) -> None:
    """The second takes 65535: sums of 67 million numbers would be all that it allows."""
    found = tiles.launches(case, H200)
    assert len(found) > 2
    assert all(len(one.programs) == 1 for one in found)
    assert all(0 < one.programs[0] <= call.MOST_PROGRAMS for one in found)


def test_more_programs_than_a_launch_may_have_are_refused() -> None:
    query, memory = meta(2**31, 1, 8), meta(2**31, 1, 8)
    refused = pytest.raises(ValueError, match=r"programs and a launch has at most 2147483647")
    with call.recording(H200), refused:
        forward.dot(query, memory, 1.0, Masking(), True, False)
