"""A warm-up run, after which a CUDA graph can capture calls of the same shapes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fused_attn.prepared import PreparedMemory


def run(layer: nn.Module, query: Any, memory: Any, masks: Any, wanted: dict[str, Any]) -> None:
    """Run ``layer`` forward and, if anything requires a gradient, backward; discard the results.

    No gradient is accumulated, and the state of the random number generators does not change.
    """
    leaves: list[Tensor] = []

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value  # forward raises the error
        leaves.append(value.detach().requires_grad_(value.requires_grad))
        return leaves[-1]

    if isinstance(memory, PreparedMemory):
        states, proj = leaf(memory.memory), leaf(memory.memory_proj)
        memory = replace(memory, memory=states, memory_proj=proj)
    else:
        memory = leaf(memory)
    query = leaf(query)
    on_gpu = isinstance(query, Tensor) and query.is_cuda
    with torch.random.fork_rng(devices=[query.device] if on_gpu else []):
        output, weights = layer(query, memory, *masks, **wanted)
    inputs = [x for x in (*leaves, *layer.parameters()) if x.requires_grad]
    roots = [x for x in (output, weights) if x is not None and x.requires_grad]
    for count in range(1, len(roots) + 1):  # a loss may or may not use the weights
        seeds = [torch.ones_like(root) for root in roots[:count]]
        torch.autograd.grad(roots[:count], inputs, seeds, retain_graph=True, allow_unused=True)
