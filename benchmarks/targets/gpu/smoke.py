"""The stage "smoke": one small case for every kernel variant, judged against fp64."""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from benchmarks.targets.gpu import cases
from benchmarks.targets.gpu.pool import Phase
from fused_attn import functional, testing
from fused_attn.prepared import exponentials
from fused_attn.testing import Case, Inputs, Tensors

PHASES = (Phase("cases", jobs=14, limit_s=45.0),)


@cache
def _cases(device: str) -> dict[str, tuple[str, Case]]:
    """Backend and case by item. On a CPU a few cases, which Triton interprets."""
    if device == "cpu":
        few = (*cases.triton()[:200:67], *cases.triton()[-3:-1])
        sizes = {"queries": 5, "source": 20, "memory_dim": 24, "attn_dim": 24}
        small = [replace(c, **{k: min(getattr(c, k), v) for k, v in sizes.items()}) for c in few]
        return {f"triton {case}": ("triton", case) for case in small}
    # In turns, so that neither backend waits for the other where time is short.
    pairs = itertools.zip_longest(cases.cuda(), cases.triton())
    named = (zip(("cuda", "triton"), pair, strict=True) for pair in pairs)
    both = itertools.chain.from_iterable(named)
    return {f"{backend} {case}": (backend, case) for backend, case in both if case is not None}


def items(phase: str, options: argparse.Namespace) -> list[str]:
    return list(_cases(options.device))


def run(phase: str, item: str, options: argparse.Namespace) -> dict[str, Any]:
    """The worst error as a share of its budget; if it exceeds that, where and by how much."""
    backend, case = _cases(options.device)[item]
    inputs = testing.make_inputs(case, device=options.device)
    with testing.poisoned_empty():
        got = step(inputs) if backend == "cuda" else testing.fused(inputs, backend)
    oracle, plain = testing.oracle(inputs), testing.plain(inputs)
    right = {name: oracle[name] for name in got}
    share = {name: _share(got[name], oracle[name], plain[name]) for name in got}
    worst = max(share, key=lambda name: (share[name] != share[name], share[name]))
    fields: dict[str, Any] = {"worst": worst, "error_share": round(share[worst], 4)}
    try:
        testing.check_results(got, right, plain)
    except AssertionError as error:
        return fields | {"outcome": "failed", "error": str(error)[:600]}
    return fields


def _share(got: torch.Tensor, oracle: torch.Tensor, plain: torch.Tensor) -> float:
    verdict = testing.judge(got, oracle, plain)
    return verdict.error / verdict.budget if verdict.budget else float(verdict.error > 0)


@torch.no_grad()
def step(inputs: Inputs) -> Tensors:
    """The results of a decoding step of the cuda backend, which has no backward."""
    tensors, mask = inputs.tensors, inputs.masking.memory_mask
    if mask is not None and mask.dim() == 2:
        mask = mask.unsqueeze(1)
    masking = inputs.masking._replace(memory_mask=mask)
    rest = (masking, inputs.grad_weights is not None, "cuda")
    memory = tensors["memory"]
    if inputs.score == "dot":
        found = functional.attend_dot(tensors["query"], memory, inputs.scale, *rest)
    else:
        keys = tensors["memory_proj"]
        concat = (tensors["query_proj"], keys, exponentials(keys), tensors["v"], memory)
        found = functional.attend_concat(*concat, *rest)
    results = {"context": found[0]}
    return results if found[1] is None else results | {"weights": found[1]}
