"""The sides that are compared: our backends, and what people use in their place.

A side turns a case into a function from tensors by name to the results, or raises `Unable`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.common.calls import Attend
from benchmarks.common.problems import Row
from benchmarks.common.sides import (
    EAGER,
    eager,
    eager_context,
    fused,
    one_head,
    query_of,
    sdpa,
    without_weights,
)
from fused_attn import backends, testing
from fused_attn.testing import Inputs, Tensors

PRODUCTS = ("dot", "general")
LARGE = 1e9  # Keras subtracts it from the scores of the padding


class Unable(Exception):
    """This side cannot compute the case; the message says why."""


@dataclass(frozen=True)
class Side:
    """One way to compute attention.

    slow: it takes long to start, and stays out of the short suite.
    """

    name: str
    make: Callable[[Row, Inputs], Attend]
    ours: bool = False
    slow: bool = False


def sides(device: str) -> list[Side]:
    """Ours first, one for each backend that is available on the device, then the others."""
    found = []
    for backend in backends.BACKENDS:
        if backend == EAGER:  # the reference, which nobody uses for its speed
            continue
        if not backends.unavailable_reasons(backend) and (backend == "cpu") == (device == "cpu"):
            found.append(Side(f"fused ({backend})", partial(_fused, backend), ours=True))
    return [*found, *OTHERS]


def _fused(backend: str, row: Row, inputs: Inputs) -> Attend:
    device = inputs.tensors["memory"].device.type
    problem = replace(row.problem, device_type=device, backward=row.backward)
    if reasons := backends.load(backend).not_supported_reasons(problem):
        raise Unable(reasons[0])
    return fused(row, inputs, backend)


def _compiler(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``call`` compiled for fixed shapes as one graph: after a break, parts would be eager."""
    return torch.compile(call, dynamic=False, fullgraph=True)


def _compiled(row: Row, inputs: Inputs) -> Attend:
    return without_weights(_compiler(eager_context(row, inputs)))


def _require_product(row: Row) -> None:
    if row.score not in PRODUCTS:
        raise Unable("the score is not a product of query and memory")


def _sdpa(row: Row, inputs: Inputs) -> Attend:
    _require_product(row)
    return sdpa(row, testing.counted(inputs))


def _flex(row: Row, inputs: Inputs) -> Attend:
    from torch.nn.attention.flex_attention import flex_attention

    _require_product(row)
    device = inputs.tensors["memory"].device.type
    if device == "cpu" and row.backward:
        raise Unable("flex_attention has no backward on a CPU")
    lengths = inputs.masking.memory_lengths
    assert lengths is not None

    def counts(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return torch.where(kv < lengths[b], score, -torch.inf)

    return one_head(row, _compiler(flex_attention), score_mod=counts)


def _flash(row: Row, inputs: Inputs) -> Attend:
    _require_product(row)
    memory = inputs.tensors["memory"]
    if importlib.util.find_spec("flash_attn") is None:
        raise Unable("flash-attn is not installed")
    if memory.shape[-1] > 256 or memory.device.type != "cuda" or memory.dtype == torch.float32:
        raise Unable("flash-attn takes heads of at most 256, in half precision, on a GPU")
    from flash_attn import flash_attn_func

    def attend(tensors: Tensors) -> Tensor:
        query, memory = query_of(row, tensors)[:, :, None], tensors["memory"][:, :, None]
        return flash_attn_func(query, memory, memory, softmax_scale=1.0)[:, :, 0]

    return without_weights(attend)


def _ffpa(row: Row, inputs: Inputs) -> Attend:
    _require_product(row)
    memory = inputs.tensors["memory"]
    if importlib.util.find_spec("ffpa_attn") is None:
        raise Unable("ffpa-attn is not installed")
    is_wide = 256 < memory.shape[-1] <= 1024  # it leaves other widths to SDPA
    if not is_wide or memory.device.type != "cuda" or memory.dtype == torch.float32:
        raise Unable("ffpa-attn is for heads of 257 to 1024, in half precision, on a GPU")
    from ffpa_attn import ffpa_attn_func

    return one_head(row, ffpa_attn_func)


def _projections(row: Row, tensors: Tensors) -> tuple[Tensor, Tensor]:
    if row.score == "concat":
        query = linear(tensors["query"], tensors["query_weight"])
        return query, linear(tensors["memory"], tensors["memory_weight"])
    return tensors["query_proj"], tensors["memory_proj"]


def _chunked(row: Row, inputs: Inputs) -> Attend:
    """Concat one target step after another, with (B, S, A) in memory at a time."""
    if row.score in PRODUCTS:
        raise Unable("a product needs no chunks")
    if row.sizes.queries == 1:
        raise Unable("there is one target step only")
    hidden = ~testing.counted(inputs)
    lowest = torch.finfo(row.dtype).min

    def attend(tensors: Tensors) -> Tensor:
        query, keys = _projections(row, tensors)
        steps = []
        for t in range(query.shape[1]):
            scores = torch.tanh(query[:, t : t + 1] + keys) @ tensors["v"]
            weights = torch.softmax(scores[:, None].masked_fill(hidden, lowest), dim=-1)
            steps.append(torch.bmm(weights, tensors["memory"]))
        return torch.cat(steps, dim=1)

    return without_weights(attend)


def _keras(row: Row, inputs: Inputs) -> Attend:
    """The operations of Keras's Attention and AdditiveAttention."""
    padding = (~testing.counted(inputs)).to(row.dtype)
    large = min(LARGE, torch.finfo(row.dtype).max / 2)

    def attend(tensors: Tensors) -> Tensor:
        if row.score in PRODUCTS:
            memory = tensors["memory"]
            scores = torch.matmul(query_of(row, tensors), memory.transpose(1, 2))
        else:
            query, keys = _projections(row, tensors)
            scores = (tensors["v"] * torch.tanh(query[:, :, None] + keys[:, None])).sum(dim=-1)
        weights = torch.softmax(scores - large * padding, dim=-1)
        return torch.matmul(weights, tensors["memory"])

    return without_weights(attend)


def _opennmt(row: Row, inputs: Inputs) -> Attend:
    """The operations of OpenNMT-py's GlobalAttention: expanded, and flattened for its layers."""
    hidden = ~testing.counted(inputs)

    def attend(tensors: Tensors) -> Tensor:
        memory = tensors["memory"]
        if row.score in PRODUCTS:
            scores = torch.bmm(query_of(row, tensors), memory.transpose(1, 2))
        else:
            query, keys = _projections(row, tensors)
            (batch, steps, width), source = query.shape, keys.shape[1]
            wide = query.view(batch, steps, 1, width).expand(batch, steps, source, width)
            deep = keys.view(batch, 1, source, width).expand(batch, steps, source, width)
            both = torch.tanh(wide + deep)
            scores = (both.view(-1, width) @ tensors["v"]).view(batch, steps, source)
        scores = scores.masked_fill(hidden, -torch.inf)
        batch, steps, source = scores.shape
        weights = torch.softmax(scores.view(batch * steps, source), dim=-1)
        return torch.bmm(weights.view(batch, steps, source), memory)

    return without_weights(attend)


OTHERS = (
    Side(EAGER, eager),
    Side("compiled eager", _compiled, slow=True),
    Side("SDPA", _sdpa),
    Side("flex_attention", _flex, slow=True),
    Side("flash-attn", _flash),
    Side("FFPA", _ffpa),
    Side("in chunks", _chunked),
    Side("as Keras", _keras),
    Side("as OpenNMT", _opennmt),
)
