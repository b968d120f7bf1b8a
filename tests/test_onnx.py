"""Export to ONNX uses only standard operators, and onnxruntime computes the same results."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from fused_attn import LuongAttention
from fused_attn.export import decompositions

B, T, S, D, E = 2, 3, 6, 4, 8
LAYERS: dict[str, dict[str, Any]] = {
    "dot": {"query_dim": E, "score": "dot"},
    "general": {"query_dim": D, "memory_dim": E, "output_dim": 5, "bias": True},
    "concat": {"query_dim": D, "memory_dim": E, "score": "concat", "output_dim": 5},
    "local": {"query_dim": D, "memory_dim": E, "local": "predictive", "window": 3},
    "location": {"query_dim": D, "memory_dim": E, "score": "location", "max_source": 20},
    "sparsemax": {"query_dim": D, "memory_dim": E, "normalizer": "sparsemax"},
}


class WithLengths(torch.nn.Module):
    """The layer, with lengths and mask as positional inputs."""

    def __init__(self, layer: LuongAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, query: Tensor, memory: Tensor, lengths: Tensor, mask: Tensor) -> Any:
        return self.layer(query, memory, lengths, mask)


def export(layer: LuongAttention) -> onnxruntime.InferenceSession:
    inputs = (
        torch.randn(B, T, layer.query_dim),
        torch.randn(B, S, E),
        torch.tensor([S, 2]),
        torch.rand(B, S) > 0.2,
    )
    batch, queries, source = (torch.export.Dim(name) for name in ("batch", "queries", "source"))
    shapes = ({0: batch, 1: queries}, {0: batch, 1: source}, {0: batch}, {0: batch, 1: source})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        program = torch.onnx.export(
            WithLengths(layer).eval(), inputs, dynamo=True, dynamic_shapes=shapes, verbose=False
        )
    domains = {node.domain for node in program.model.graph.all_nodes()}
    assert domains <= {"", "ai.onnx"}, domains
    return onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )


@pytest.mark.parametrize("kind", LAYERS)
def test_onnxruntime_gives_the_same(kind: str) -> None:
    """With other sizes than in the export, a fully masked row, and NaN in the padding."""
    torch.manual_seed(0)
    layer = LuongAttention(**LAYERS[kind]).eval()
    session = export(layer)
    names = [value.name for value in session.get_inputs()]
    for batch, queries, source in ((3, 5, 17), (1, 1, 2)):
        lengths = torch.tensor([source, 0, source // 2][:batch])
        mask = torch.rand(batch, source) > 0.3
        query = torch.randn(batch, queries, layer.query_dim)
        memory = torch.randn(batch, source, E)
        unread = ~mask | (torch.arange(source) >= lengths[:, None])
        memory = memory.masked_fill(unread[..., None], torch.nan)
        inputs = [query, memory, lengths, mask]
        got = session.run(None, {k: x.numpy() for k, x in zip(names, inputs, strict=True)})
        with torch.no_grad():
            expected = layer(query, memory, lengths, mask)
        for result, wanted in zip(got, expected, strict=True):
            np.testing.assert_allclose(result, wanted.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*treespec")  # torch.export's own
@pytest.mark.parametrize("score", ["general", "concat"])
def test_a_program_with_our_operators_decomposes(score: str) -> None:
    torch.manual_seed(0)
    layer = WithLengths(LuongAttention(D, E, score)).eval()
    inputs = (
        torch.randn(B, T, D),
        torch.randn(B, S, E),
        torch.tensor([S, 2]),
        torch.ones(B, S) > 0,
    )
    program = torch.export.export(layer, inputs)

    def targets(program: torch.export.ExportedProgram) -> set[str]:
        return {str(n.target) for n in program.graph.nodes if n.op == "call_function"}

    assert any("fused_attn" in name for name in targets(program))
    plain = program.run_decompositions(decompositions())
    assert not any("fused_attn" in name for name in targets(plain))
    with torch.no_grad():
        torch.testing.assert_close(plain.module()(*inputs), layer(*inputs))
