"""Local attention in every backend: windows of positions, their Gaussian, and what it costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from targets import Target, every_target
from test_backends import SIZES, short, sized

from fused_attn import LocalWindow, dot_attention, functional, testing
from fused_attn.prepared import exponentials
from fused_attn.reference import window_bounds
from fused_attn.testing import DTYPES, LAYOUTS, MASKS, SCORES, Case

WINDOWS = ("hard", "gaussian")


@every_target
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("score", ["dot", "concat"])  # with either, one operator
def test_sizes(score: str, window: str, size: str, target: Target) -> None:
    target.check(sized(score, torch.float32, size, window=window, weights=size != "wide"))


@every_target
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("score", SCORES)
def test_everything_at_once(score: str, window: str, dtype: torch.dtype, target: Target) -> None:
    case = sized(score, dtype, "odd", window=window, lengths=True, mask="cube", keep=True)
    target.check(replace(case, bias=score == "concat"))


@every_target
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
@pytest.mark.parametrize("score", ["dot", "projected"])
def test_masks_and_layouts(score: str, layout: str, mask: str, target: Target) -> None:
    case = sized(score, torch.float32, "step", window="gaussian", mask=mask, layout=layout)
    target.check(replace(case, queries=3, lengths=True))


@every_target
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("score", ["dot", "projected"])
def test_what_no_window_covers_is_not_read(score: str, window: str, target: Target) -> None:
    """NaN outside of all windows changes neither results nor gradients."""
    case = Case(score, queries=3, source=40, window=window, lengths=True)
    if target.refusals(case):
        pytest.skip(f"{target.backend} has no windows")
    inputs = target.inputs(case)
    centers = torch.tensor([[4.0, 6.0, 5.0]], device=target.device).expand(3, 3).contiguous()
    local = LocalWindow(centers, 3.0, window == "gaussian")
    tensors = inputs.tensors | ({"centers": centers} if window == "gaussian" else {})
    inputs = replace(inputs, masking=inputs.masking._replace(window=local), tensors=tensors)
    spoiled = testing.spoil_padding(inputs, torch.nan)
    assert spoiled.tensors["memory"][0, 10:].isnan().all()
    got = target.run(spoiled)
    testing.check_results(got, testing.oracle(inputs), testing.plain(inputs))


@every_target
@pytest.mark.parametrize("score", ["dot", "projected"])
def test_a_spoiled_row_spoils_only_the_windows_that_hold_it(score: str, target: Target) -> None:
    case = Case(score, batch=1, queries=3, source=20, window="gaussian")
    if target.refusals(case):
        pytest.skip(f"{target.backend} has no windows")
    inputs = target.inputs(case)
    centers = torch.tensor([[3.0, 9.0, 15.0]], device=target.device)
    local = LocalWindow(centers, 3.5, True)
    tensors = inputs.tensors | {"centers": centers}
    inputs = replace(inputs, masking=inputs.masking._replace(window=local), tensors=tensors)
    clean = target.run(inputs)
    memory = inputs.tensors["memory"].clone()
    memory[0, 9] = torch.nan
    got = target.run(replace(inputs, tensors=inputs.tensors | {"memory": memory}))
    assert got["context"][0, 1].isnan().all()
    for name in ("context", "weights", "grad_centers"):
        torch.testing.assert_close(got[name][0, ::2], clean[name][0, ::2], rtol=0, atol=0)
    query = "grad_query" if score == "dot" else "grad_query_proj"
    torch.testing.assert_close(got[query][0, ::2], clean[query][0, ::2], rtol=0, atol=0)


@every_target
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_prepared_exponentials(dtype: torch.dtype, target: Target) -> None:
    case = Case("projected", dtype, queries=4, source=50, attn_dim=64, window="gaussian")
    if target.refusals(case):
        pytest.skip(f"{target.backend} has no windows")
    inputs = target.inputs(case)
    tensors = inputs.tensors

    def call(prepared: bool) -> torch.Tensor:
        exp = exponentials(tensors["memory_proj"]) if prepared else None
        operands = (tensors["query_proj"], tensors["memory_proj"], exp, tensors["v"])
        masking = tuple(inputs.masking)
        with target.active(), testing.poisoned_empty():
            return functional.attend_concat(
                *operands, tensors["memory"], masking, True, target.backend
            )[0]

    tolerance = 2 * testing.FLOORS[dtype]
    torch.testing.assert_close(call(True), call(False), rtol=0, atol=tolerance)


@every_target
def test_bounds_are_those_of_the_definition(target: Target) -> None:
    """Edges that fall on positions, halves, huge and infinite centers, and NaN."""
    if target.refusals(Case("dot", window="hard")):
        pytest.skip(f"{target.backend} has no windows")
    special = [0.0, 2.0, 2.5, -3.0, -3.0001, 8.0, 11.0, 12.0, 1e30, -1e30, torch.inf, -torch.inf]
    centers = torch.tensor([special], device=target.device)
    memory = torch.eye(9, device=target.device)[None]
    query = torch.zeros(1, len(special), 9, device=target.device)
    for half_width in (0.0, 0.5, 3.0):
        window = LocalWindow(centers, half_width)
        with target.active(), testing.poisoned_empty():
            context, _ = dot_attention(query, memory, window=window, backend=target.backend)
        seen = [[s for s in range(9) if abs(s - c) <= half_width] for c in special]
        bounds = window_bounds(centers, half_width, 9)[0].tolist()
        assert [list(range(*pair)) for pair in bounds] == seen
        for row, positions in zip(context[0], seen, strict=True):
            expected = torch.zeros(9)
            expected[positions] = 1 / max(len(positions), 1)
            torch.testing.assert_close(row.cpu(), expected)


@every_target
def test_a_center_that_is_nan_shows(target: Target) -> None:
    if target.refusals(Case("dot", window="gaussian")):
        pytest.skip(f"{target.backend} has no windows")
    centers = torch.tensor([[torch.nan, 2.0]], device=target.device)
    query, memory = torch.ones(1, 2, 8), torch.ones(1, 5, 8)
    operands = (query.to(target.device), memory.to(target.device))
    with target.active():
        window = LocalWindow(centers, 2.0, gaussian=True)
        context, _ = dot_attention(*operands, window=window, backend=target.backend)
    assert context[0, 0].isnan().all() and context[0, 1].isfinite().all()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("score", ["dot", "projected"])
def test_bits_do_not_depend_on_the_threads(score: str, threads: int) -> None:
    """Also where the backward cuts a long source into segments."""
    case = Case(score, batch=1, queries=7, source=3000, memory_dim=40, window="gaussian")
    inputs = testing.make_inputs(case)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        got = testing.fused(inputs, "cpu")
        torch.set_num_threads(1)
        expected = testing.fused(inputs, "cpu")
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("score", ["dot", "projected"])
def test_long_sources_within_budget(score: str) -> None:
    case = Case(score, batch=2, queries=40, source=2500, memory_dim=40, window="gaussian")
    inputs = testing.make_inputs(replace(case, mask="row", lengths=True))
    got = testing.fused(testing.spoil_padding(inputs, torch.nan), "cpu")
    testing.check_results(got, testing.oracle(inputs), testing.plain(inputs))
