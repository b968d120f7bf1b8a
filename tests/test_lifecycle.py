"""The life of a layer: copies, files, meta tensors, compilation, several processes."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_attn import LuongAttention

B, T, S, D, E = 4, 3, 6, 5, 8
KINDS: dict[str, dict[str, Any]] = {
    "dot": {"query_dim": E, "score": "dot", "scale": "learned"},
    "general": {"query_dim": D, "memory_dim": E, "output_dim": 7, "bias": True},
    "concat": {"query_dim": D, "memory_dim": E, "score": "concat", "weight_norm": True},
    "normed": {"query_dim": D, "memory_dim": E, "score": "concat", "layer_norm": True},
    "history": {"query_dim": D, "memory_dim": E, "score": "concat", "conv_channels": 2},
    "location": {"query_dim": D, "memory_dim": E, "score": "location", "max_source": 9},
    "local": {"query_dim": D, "memory_dim": E, "local": "predictive", "window": 3},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def draw(layer: LuongAttention) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    dtype = next(layer.parameters()).dtype
    return torch.randn(B, T, layer.query_dim, dtype=dtype), torch.randn(B, S, E, dtype=dtype)


def saved(layer: LuongAttention) -> Any:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def pickled(layer: LuongAttention) -> Any:
    return pickle.loads(pickle.dumps(layer))


COPIES = {"deepcopy": copy.deepcopy, "pickle": pickled, "save": saved}


@every_kind
@pytest.mark.parametrize("how", COPIES)
def test_copies_compute_the_same(kind: str, how: str) -> None:
    layer = LuongAttention(**KINDS[kind])
    other = COPIES[how](layer)
    torch.testing.assert_close(other(*draw(layer)), layer(*draw(layer)))
    assert {id(p) for p in other.parameters()}.isdisjoint(id(p) for p in layer.parameters())


@every_kind
def test_state_dict_is_the_whole_state(kind: str) -> None:
    layer, other = LuongAttention(**KINDS[kind]), LuongAttention(**KINDS[kind])
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    torch.testing.assert_close(other(*draw(layer)), layer(*draw(layer)))


@every_kind
def test_shells_without_values(kind: str) -> None:
    """On the meta device and with skip_init, parameters are not initialised until values load."""
    layer = LuongAttention(**KINDS[kind])
    shell = LuongAttention(**KINDS[kind], device="meta")
    assert {p.device.type for p in shell.parameters()} == {"meta"}
    output, weights = shell(*(x.to("meta") for x in draw(layer)))
    expected = layer(*draw(layer))
    assert output.shape == expected[0].shape and weights.shape == expected[1].shape
    loaded = shell.to_empty(device="cpu")
    loaded.load_state_dict(layer.state_dict())
    torch.testing.assert_close(loaded(*draw(layer)), expected)
    skipped = nn.utils.skip_init(LuongAttention, **KINDS[kind])
    skipped.load_state_dict(layer.state_dict())
    torch.testing.assert_close(skipped(*draw(layer)), expected)
    skipped.reset_parameters()
    assert all(p.isfinite().all() for p in skipped.parameters())


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    layer = LuongAttention(**KINDS[kind])
    inputs = draw(layer)
    output, weights = layer.to(dtype)(*(x.to(dtype) for x in inputs))
    assert output.dtype == weights.dtype == dtype
    output.float().square().sum().backward()
    assert all(p.grad is None or p.grad.dtype == dtype for p in layer.parameters())


@every_kind
def test_autocast_reaches_every_parameter(kind: str) -> None:
    # The window covers all positions: otherwise bfloat16 may round a center and move a hard edge.
    wide = {"window": S} if kind == "local" else {}
    layer = LuongAttention(**KINDS[kind] | wide)
    query, memory = draw(layer)
    history = {"previous_weights": torch.rand(B, T, S)} if kind == "history" else {}
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = layer(query, memory, **history)
    expected, _ = layer(query, memory, **history)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=5e-2)
    output.float().square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@every_kind
def test_compiled_forward_and_backward(kind: str) -> None:
    torch._dynamo.reset()
    layer = LuongAttention(**KINDS[kind])
    query, memory = draw(layer)
    history = {"previous_weights": torch.rand(B, T, S)} if kind == "history" else {}
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    found = []
    for call in (layer, compiled):
        output, weights = call(query, memory, **history)
        loss = output.square().sum() + weights.square().sum()
        found.append([output, weights, *torch.autograd.grad(loss, list(layer.parameters()))])
    torch.testing.assert_close(*found)
    torch._dynamo.reset()


def test_weight_norm_of_torch_works_on_the_projections() -> None:
    layer = LuongAttention(D, E, "concat")
    expected = layer(*draw(layer))
    nn.utils.parametrizations.weight_norm(layer.query_proj)
    torch.testing.assert_close(layer(*draw(layer)), expected)


def test_parameters_in_shared_memory() -> None:
    layer = LuongAttention(D, E).share_memory()
    assert all(p.is_shared() for p in layer.parameters())
    assert layer(*draw(layer))[0].isfinite().all()


DISTRIBUTED = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from fused_attn import LuongAttention

rank, world, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
torch.manual_seed(0)
layer = LuongAttention(5, 8, "concat", output_dim=4, dtype=torch.float64)
torch.manual_seed(1)
query, memory = torch.randn(3, 4, 3, 5).double(), torch.randn(3, 4, 6, 8).double()
lengths = torch.tensor([6, 2, 0, 5])
model = layer
if world > 1:
    dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=world)
    model = nn.parallel.DistributedDataParallel(layer)
optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
rows = slice(rank * 4 // world, (rank + 1) * 4 // world)
for q, m in zip(query, memory):
    optimizer.zero_grad()
    model(q[rows], m[rows], lengths[rows])[0].square().mean().backward()
    optimizer.step()
if rank == 0:
    torch.save(layer.state_dict(), out)
if world > 1:
    dist.destroy_process_group()
"""


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """DistributedDataParallel on gloo: the gradients of two halves of a batch."""

    def train(world: int) -> dict[str, Tensor]:
        out, store = tmp_path / f"{world}.pt", tmp_path / f"store{world}"
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", DISTRIBUTED, str(rank), str(world), str(store), str(out)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world)
        ]
        for worker in workers:
            printed, _ = worker.communicate(timeout=120)
            assert worker.returncode == 0, printed
        return torch.load(out, weights_only=True)

    torch.manual_seed(0)
    start = LuongAttention(5, 8, "concat", output_dim=4, dtype=torch.float64).state_dict()
    alone, together = train(1), train(2)
    for name, parameter in alone.items():
        assert not torch.equal(parameter, start[name])
        torch.testing.assert_close(together[name], parameter, rtol=1e-9, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU to capture a graph on")
@every_kind
def test_a_cuda_graph(kind: str) -> None:
    layer = LuongAttention(**KINDS[kind]).cuda()
    query, memory = (x.cuda() for x in draw(layer))
    layer.warm_up(query, memory)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        output, _ = layer(query, memory)
    query.copy_(torch.randn_like(query))
    graph.replay()
    torch.testing.assert_close(output, layer(query, memory)[0])
