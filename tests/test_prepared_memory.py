"""`PreparedMemory`: selecting rows, other devices and dtypes, and use as a pytree."""

from __future__ import annotations

import copy
import io
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fused_attn import LuongAttention, PreparedMemory

B, T, S, D, E, A = 4, 3, 6, 5, 8, 16
SCORES = ("dot", "general", "concat")
LENGTHS = torch.tensor([S, 0, 4, 2])


def make(score: str, **options: Any) -> LuongAttention:
    torch.manual_seed(0)
    options |= {"attn_dim": A} if score == "concat" else {}
    return LuongAttention(E if score == "dot" else D, E, score, **options)


def draw(layer: LuongAttention) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(B, T, layer.query_dim), torch.randn(B, S, E)


ROWS: list[Any] = [
    slice(1, 3),
    slice(None, None, 2),
    slice(0, 0),
    torch.tensor([3, 0, 0]),
    torch.tensor([2], dtype=torch.int32),
    torch.tensor([True, False, True, False]),
]


@pytest.mark.parametrize("rows", ROWS, ids=repr)
@pytest.mark.parametrize("score", SCORES)
def test_rows_of_it(score: str, rows: Any) -> None:
    layer = make(score)
    query, memory = draw(layer)
    mask = torch.rand(B, T, S) > 0.3
    picked = layer.prepare_memory(memory, LENGTHS, mask)[rows]
    expected = layer(query[rows], memory[rows], LENGTHS[rows], mask[rows])
    assert len(picked) == len(expected[0])
    torch.testing.assert_close(layer(query[rows], picked), expected)


def test_a_slice_is_a_view() -> None:
    prepared = make("concat").prepare_memory(torch.randn(B, S, E), LENGTHS)
    part = prepared[1:3]
    assert part.memory.data_ptr() == prepared.memory[1].data_ptr()
    assert part.memory_exp.data_ptr() == prepared.memory_exp[1].data_ptr()


@pytest.mark.parametrize("rows", [1, "a", torch.ones(2), torch.ones(3) > 0, torch.ones(1, 1).int()])
def test_what_is_no_row(rows: Any) -> None:
    prepared = make("dot").prepare_memory(torch.randn(B, S, E))
    message = "PreparedMemory of 4 rows must be a slice, an integer Tensor (N,) or a bool Tensor"
    with pytest.raises(TypeError, match=re.escape(message)):
        prepared[rows]


@pytest.mark.parametrize("score", SCORES)
def test_beams_are_reordered(score: str) -> None:
    """Beams (B, K, D) share a memory row; finished sentences leave the batch."""
    layer = make(score)
    _, memory = draw(layer)
    prepared = layer.prepare_memory(memory, LENGTHS)
    beams = torch.randn(B, 5, layer.query_dim)
    keep = torch.tensor([2, 0])
    got = layer(beams[keep], prepared.index_select(keep))
    for result, whole in zip(got, layer(beams, memory, LENGTHS), strict=True):
        torch.testing.assert_close(result, whole[keep])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", SCORES)
def test_another_dtype(score: str, dtype: torch.dtype) -> None:
    """As if prepared from a projection in that dtype: the exponentials agree with it."""
    layer = make(score)
    query, memory = draw(layer)
    moved = layer.prepare_memory(memory, LENGTHS).to(dtype)
    assert moved.memory.dtype == dtype and moved.memory_lengths.dtype == torch.int64
    if score == "concat":
        assert moved.memory_proj.dtype == dtype
        expected = torch.exp(2 * moved.memory_proj.detach().double())
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(moved.memory_exp.double(), expected, rtol=tolerance, atol=0)
    context, _ = layer.to(dtype)(query.to(dtype), moved)
    exact = make(score).double()(query.double(), memory.double(), LENGTHS)[0]
    torch.testing.assert_close(
        context.double(), exact, rtol=0, atol=5e-2 if dtype.itemsize == 2 else 1e-6
    )


def test_another_device() -> None:
    prepared = make("concat").prepare_memory(torch.randn(B, S, E), LENGTHS, torch.ones(B, S) > 0)
    moved = prepared.to("meta")
    devices = {t.device.type for t in pytree.tree_leaves(moved)}
    assert devices == {"meta"} and len(pytree.tree_leaves(moved)) == 5
    assert prepared.to("cpu").memory is prepared.memory


def test_no_gradient_flows_through_what_is_detached() -> None:
    layer = make("concat")
    query, memory = draw(layer)
    memory.requires_grad_()
    prepared = layer.prepare_memory(memory)
    assert prepared.memory_proj.requires_grad
    detached = prepared.detach()
    assert not any(t.requires_grad for t in pytree.tree_leaves(detached))
    torch.testing.assert_close(layer(query, detached), layer(query, prepared))


def test_it_says_what_it_is() -> None:
    prepared = make("concat").prepare_memory(torch.randn(B, S, E), LENGTHS)
    expected = (
        "PreparedMemory(score='concat', memory=(4, 6, 8), memory_proj=(4, 6, 16), "
        "memory_exp=(4, 6, 16), memory_lengths=(4,), dtype=float32, device=cpu)"
    )
    assert repr(prepared) == expected


def test_copies() -> None:
    layer = make("concat")
    query, memory = draw(layer)
    prepared = layer.prepare_memory(memory, LENGTHS).detach()
    buffer = io.BytesIO()
    torch.save(prepared, buffer)
    buffer.seek(0)
    others = [pickle.loads(pickle.dumps(prepared)), copy.deepcopy(prepared), copy.copy(prepared)]
    others.append(torch.load(buffer, weights_only=True))
    for other in others:
        torch.testing.assert_close(layer(query, other), layer(query, prepared))


@pytest.mark.parametrize("score", SCORES)
def test_a_pytree(score: str) -> None:
    prepared = make(score).prepare_memory(torch.randn(B, S, E), LENGTHS)
    leaves, spec = pytree.tree_flatten(prepared)
    again = pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, PreparedMemory) and again.score == score
    assert all(x is y for x, y in zip(pytree.tree_leaves(again), leaves, strict=True))
    doubled = pytree.tree_map(lambda x: x + x, prepared)
    assert torch.equal(doubled.memory, 2 * prepared.memory)
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(prepared)[0]]
    assert "['memory']" in paths and "['memory_lengths']" in paths


class Step(torch.nn.Module):
    def __init__(self, layer: LuongAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, query: Tensor, prepared: PreparedMemory) -> tuple[Tensor, Tensor | None]:
        return self.layer(query, prepared)


@pytest.mark.parametrize("score", SCORES)
def test_exported_with_a_prepared_memory(score: str) -> None:
    """Exported with a dynamic batch size; saved, loaded, and run with another batch size."""
    layer = make(score, output_dim=3)
    query, memory = draw(layer)
    prepared = layer.prepare_memory(memory, LENGTHS).detach()
    batch = torch.export.Dim("batch", min=1)
    leaves = [{0: batch} for _ in pytree.tree_leaves(prepared)]
    shapes = ({0: batch}, leaves)
    program = torch.export.export(Step(layer), (query[:, 0], prepared), dynamic_shapes=shapes)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for rows in (slice(0, 4), slice(1, 4)):
        got = loaded(query[rows, 1], prepared[rows])
        torch.testing.assert_close(got, layer(query[rows, 1], prepared[rows]))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo accesses it
@pytest.mark.parametrize("score", SCORES)
def test_compiled_with_a_prepared_memory(score: str) -> None:
    torch._dynamo.reset()
    layer = make(score)
    query, memory = draw(layer)
    prepared = layer.prepare_memory(memory, LENGTHS)
    compiled = torch.compile(Step(layer), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query[:, 0], prepared), layer(query[:, 0], prepared))
    torch._dynamo.reset()
