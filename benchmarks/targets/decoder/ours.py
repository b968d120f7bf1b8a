"""Our side of each row: the only module here that calls the native decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fused_attn.seq2seq.search.packed import PackedModels, spec_of
from torch import Tensor

from benchmarks.targets.decoder.problem import Problem
from fused_attn import packed
from fused_attn.seq2seq.config import SearchConfig
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.search.hypothesis import Hypothesis
from fused_attn.seq2seq.search.search import search


def steps(problem: Problem, compute: str) -> Callable[[], Tensor]:
    """All steps of a problem in one call: its symbols (B, T), or the last hidden state (B, H)."""
    native = packed.native_module()
    state: tuple[Any, ...] = (problem.hidden, problem.cell, None, None, 0)
    spec = spec_of(problem.model, compute)
    if not problem.chooses:
        fed = native.PackedModel(spec | {"embedding": None, "output_weight": None, "encoder": None})
        return lambda: fed.run_steps(
            problem.embedded, problem.memory, None, state, False, torch.get_num_threads()
        )[3][0]
    decoder = native.PackedModel(spec | {"encoder": None})
    count = problem.sizes.steps
    limits = torch.full((problem.batch,), count)
    options = {
        "most": 1, "nbest_mass": 0.0, "length_penalty": "average", "alpha": 0.6,
        "coverage_penalty": 0.0, "min_length": count, "block_ngrams": 0, "sample": False,
        "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0, "return_weights": False,
    }  # fmt: skip

    def run() -> Tensor:
        found = decoder.search_memory(
            problem.memory, None, state, limits, None, 1, options, torch.get_num_threads()
        )
        return torch.tensor([hypotheses[0][0] for hypotheses in found])

    return run


def searched(
    model: Seq2Seq, source: Tensor, lengths: Tensor, config: SearchConfig
) -> Callable[[], list[list[Hypothesis]]]:
    """A search for the targets of a batch, encoder included, with products in float32."""
    models = PackedModels([model])
    return lambda: search(model, source, lengths, config, packed=models)
