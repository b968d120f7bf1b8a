"""How many launches each kind of call of the Triton backend makes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from fused_attn.kernels.launch import Chip

from fused_attn.backends.triton import backward, call, forward
from fused_attn.reference import MaskingFields

H200 = Chip(132, 232448)
# (B, T, S, D): one query, few, many; short rows, long ones, widths that no unit divides.
SIZES = [
    (64, 1, 50, 512), (1, 1, 1024, 512), (64, 1, 1024, 512), (8, 5, 1024, 512), (64, 50, 50, 512),
    (2, 20, 100, 512), (64, 64, 1024, 512), (64, 64, 1024, 1024), (3, 7, 300, 999),
    (64, 3, 200, 36),
]  # fmt: skip
MASKS = ["", "lengths", "lengths row keep", "cube", "window", "gaussian"]


def masking(flags: str, batch: int, queries: int, source: int) -> MaskingFields:
    def bits(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bool, device="meta")

    lengths = torch.empty(batch, dtype=torch.int64, device="meta") if "lengths" in flags else None
    mask = bits(batch, source) if "row" in flags else None
    mask = bits(batch, queries, source) if "cube" in flags else mask
    keep = bits(batch, queries, source) if "keep" in flags else None
    window = None
    if flags in ("window", "gaussian"):
        window = (torch.empty(batch, queries, device="meta"), 10.0, flags == "gaussian")
    return lengths, mask, keep, 1.25, window


def passes(
    score: str, sizes: tuple[int, ...], flags: str, dtype: torch.dtype
) -> Iterator[tuple[str, int]]:
    """(pass, launches) with and without weights, and for each set of wanted gradients."""
    batch, queries, source, width = sizes

    def rows(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    query, memory, v = rows(batch, queries, width), rows(batch, source, width), rows(width)
    weights, where = rows(batch, queries, source), masking(flags, batch, queries, source)
    logsumexp = torch.empty(batch, queries, device="meta")
    for with_weights in (False, True):
        with call.recording(H200) as launches:
            if score == "dot":
                forward.dot(query, memory, 1.0, where, with_weights, True)
            else:
                forward.concat(query, memory, None, v, memory, where, with_weights, True)
        yield "forward", len(launches)
        grad_outputs = (query, weights if with_weights else None)
        saved = (query, weights if with_weights else None, logsumexp)
        count = 2 if score == "dot" else 4
        for wanted in itertools.product((False, True), repeat=count):
            with call.recording(H200) as launches:
                if score == "dot":
                    every = [*wanted, flags == "gaussian"]
                    backward.dot(*grad_outputs, query, memory, 1.0, where, saved, every)
                else:
                    every = [*wanted, flags == "gaussian"]
                    backward.concat(*grad_outputs, query, memory, v, memory, where, saved, every)
            yield f"backward of {wanted}", len(launches)


@pytest.mark.parametrize("flags", MASKS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("score", "most"), [("dot", (2, 3)), ("concat", (3, 5))])
def test_a_call_makes_few_launches(
    score: str, most: tuple[int, int], dtype: torch.dtype, sizes: tuple[int, ...], flags: str
) -> None:
    """Of concat one makes the exponentials, and two the gradients of projections and memory."""
    for name, launches in passes(score, sizes, flags, dtype):
        assert 1 <= launches <= most[name != "forward"], name


def test_a_training_step_on_short_rows_has_the_fewest() -> None:
    found = dict(passes("dot", (64, 50, 50, 512), "lengths", torch.bfloat16))
    assert found["forward"] == 1 and found["backward of (True, True)"] == 2


def test_windows_are_made_of_nothing_but_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """No operator of torch computes on the centers: the kernels do."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: set[str] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Watch():
        counts = list(passes("dot", (4, 20, 100, 64), "gaussian", torch.bfloat16))
        counts += passes("concat", (4, 20, 100, 64), "gaussian", torch.bfloat16)
    assert counts and seen <= {"empty", "new_empty", "empty_like", "view", "detach"}
