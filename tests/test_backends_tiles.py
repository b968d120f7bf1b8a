"""Every variant of the Triton kernels that the launch table can ask for, against the oracle.

The calls are chosen from the table as it is (see `tiles`), so that new tiles bring calls of their
own. Where kernels are interpreted a part of the calls runs; with TILES=all, as in
`make test-tiles`, all do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import product, starmap
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

import tiles
from fused_attn.kernels.launch import Chip
from targets import TARGETS, Target

from fused_attn import testing
from fused_attn.backends.triton import backward, call, forward, window
from fused_attn.testing import Case, Inputs

# The table is asked about the GPU that is here, or in its absence about one that would be.
ON_GPU = torch.cuda.is_available()
CHIP = call.chip(torch.device("cuda", 0)) if ON_GPU else tiles.H200
TRITON = [target for target in TARGETS if isinstance(target, Target) and target.backend == "triton"]
# Chips that a small batch fills, or nearly, as larger ones fill the other.
CHIPS = (CHIP, *(Chip(count, CHIP.shared_memory, CHIP.is_nvidia) for count in (1, 6, 12, 24)))
CASES = tiles.chosen(product(tiles.small(), CHIPS)) if TRITON else []
# Half of the variants of 16 bits in either type.
CASES = [
    (replace(case, dtype=torch.float16), chip)
    if case.dtype == torch.bfloat16 and index % 2
    else (case, chip)
    for index, (case, chip) in enumerate(CASES)
]


def is_short(case: Case) -> bool:
    """Whether interpreting takes a second or two, and the contract tests leave the sizes out."""
    beyond = case.queries > 20 or case.source > 170 or case.memory_dim > 70
    # Concat loops over columns, and in its backward over the rows of the other side.
    work = tiles.work(case) * (8 if case.score == "projected" else 1)
    return beyond and case.source < 1000 and work < 150_000


RUN = CASES
if not ON_GPU and os.environ.get("TILES") != "all":
    RUN = tiles.chosen((one for one in CASES if is_short(one[0])), tiles.interpreted)


def regime(case: Case, chip: Chip) -> str:
    """The kernels that make the context, as the first word of a test's name."""
    if case.window != "none":
        return "window"
    names = {one.kernel.__name__ for one in tiles.launches(case, chip)}
    found = (word for word in ("online", "rows", "step") if f"{word}_forward" in names)
    return next(found, "columns")


def name(case: Case, chip: Chip) -> str:
    return "-".join([regime(case, chip), str(case), f"on{chip.multiprocessors}"])


def cut(inputs: Inputs) -> Inputs:
    """The inputs with lengths of which one ends within a tile."""
    batch, source, _ = inputs.tensors["memory"].shape
    if inputs.masking.memory_lengths is None:
        return inputs
    lengths = torch.tensor([source - source // 3, source, 0])[:batch]
    lengths = lengths.to(inputs.tensors["memory"].device)
    return replace(inputs, masking=inputs.masking._replace(memory_lengths=lengths))


@contextmanager
def launching(chip: Chip) -> Iterator[list[call.Launch]]:
    """Within it the table is asked about ``chip``, and what is launched is kept in the list."""
    found: list[call.Launch] = []
    enqueue = call.enqueue

    def kept(kernel: Any, programs: Any, tensors: Any, numbers: Any, **options: Any) -> None:
        enqueue(kernel, programs, tensors, numbers, **options)
        found.append(call.Launch(kernel, programs, (*tensors, *numbers), options))

    with ExitStack() as patches:
        for module in (call, forward, backward, window):
            patches.enter_context(mock.patch.object(module, "enqueue", kept))
        patches.enter_context(mock.patch.object(call, "chip", lambda device: chip))
        yield found


@pytest.mark.parametrize("target", TRITON, ids=str)
@pytest.mark.parametrize(("case", "chip"), RUN, ids=starmap(name, RUN))
def test_every_variant(case: Case, chip: Chip, target: Target) -> None:
    inputs = cut(testing.make_inputs(case, device=target.device))
    with launching(chip) as launches:
        got = target.run(inputs)
    testing.check_results(got, testing.oracle(inputs), testing.plain(inputs))
    reached = {variant for one in launches for variant in tiles.variants_of(one, case)}
    assert reached >= tiles.variants(case, chip)


@pytest.mark.skipif(not TRITON, reason="the triton backend cannot run here")
def test_no_variant_is_left_out() -> None:
    """Calls of every size that models have reach nothing that the calls above do not."""
    tested = {variant for one in CASES for variant in tiles.variants(*one)}
    missing = {
        variant: str(case)
        for case in tiles.large(3000)
        for variant in tiles.variants(case, CHIP)
        if variant not in tested
    }
    assert not missing


@pytest.mark.parametrize("target", TRITON, ids=str)
def test_more_splits_than_are_merged_at_once(target: Target) -> None:
    sizes = {"batch": 2, "queries": 9, "source": 600, "memory_dim": 16, "attn_dim": 8}
    case = Case("projected", **sizes, lengths=True)
    inputs = cut(testing.make_inputs(case, device=target.device))
    with launching(CHIP) as launches:
        got = target.run(inputs)
    testing.check_results(got, testing.oracle(inputs), testing.plain(inputs))
    (merged,) = (one for one in launches if one.kernel.__name__ == "context_columns")
    given = dict(zip(merged.kernel.arg_names, merged.arguments, strict=False))
    assert given["splits"] > merged.options["BLOCKS"]
