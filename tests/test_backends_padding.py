"""What does not count is never read: NaN and inf in padding, empty rows, dropped weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from targets import Target, every_target
from torch import Tensor

from fused_attn import functional, testing
from fused_attn.testing import DTYPES, SCORES, Case, Inputs

NAN, INF = torch.nan, torch.inf
SIZES = {
    "step": {"queries": 1, "source": 37, "memory_dim": 64, "attn_dim": 64},
    "odd": {"queries": 17, "source": 37, "memory_dim": 37, "attn_dim": 17},
    "segments": {"queries": 3, "source": 700, "memory_dim": 64, "attn_dim": 33},
}
MASKED = {
    "lengths": {"lengths": True},
    "shared": {"mask": "shared"},
    "row": {"mask": "row"},
    "lengths_row": {"lengths": True, "mask": "row"},
    "lengths_cube": {"lengths": True, "mask": "cube"},
    "lengths_cube_keep": {"lengths": True, "mask": "cube", "keep": True},
}


def short(value: object) -> str:
    return str(value).removeprefix("torch.")


def unread(inputs: Inputs) -> Tensor:
    """Bool (B, S): memory rows that no query looks at."""
    return ~testing.counted(inputs).any(dim=1)


@every_target
@pytest.mark.parametrize(
    ("size", "value"),
    [*((size, NAN) for size in SIZES), ("odd", INF)],
    ids=[*(f"{size}-nan" for size in SIZES), "odd-inf"],
)
@pytest.mark.parametrize("masked", MASKED)
@pytest.mark.parametrize("score", SCORES)
def test_padding_changes_no_bit(
    score: str, value: float, masked: str, size: str, target: Target
) -> None:
    if size == "segments" or value == INF:
        target.needs_speed()
    clean = target.inputs(Case(score, **SIZES[size], **MASKED[masked]))
    assert unread(clean).any()
    expected, got = target.run(clean), target.run(testing.spoil_padding(clean, value))
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


@every_target
@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("score", SCORES)
def test_padding_changes_no_bit_in_any_dtype_and_layout(
    score: str, dtype: torch.dtype, layout: str, target: Target
) -> None:
    clean = target.inputs(Case(score, dtype, lengths=True, mask="cube", layout=layout))
    spoiled = testing.spoil_padding(clean, NAN)
    laid = {name: testing.lay_out(t, layout) for name, t in spoiled.tensors.items()}
    expected, got = target.run(clean), target.run(replace(spoiled, tensors=laid))
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


@every_target
@pytest.mark.parametrize("masked", MASKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("score", SCORES)
def test_memory_that_nobody_reads_has_gradient_zero(
    score: str, dtype: torch.dtype, masked: str, target: Target
) -> None:
    inputs = target.inputs(Case(score, dtype, **SIZES["step"], **MASKED[masked]))
    got = target.run(testing.spoil_padding(inputs, NAN))
    for name in {"memory", "memory_proj"} & inputs.tensors.keys():
        grad = got[f"grad_{name}"]
        assert not grad[unread(inputs)].any()
        assert grad[~unread(inputs)].any()


@every_target
@pytest.mark.parametrize("masked", ["lengths", "shared", "row", "lengths_cube"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("score", SCORES)
def test_nothing_to_attend_to(score: str, dtype: torch.dtype, masked: str, target: Target) -> None:
    """Context 0, weights 0, gradients 0 for such a query, and an ordinary result for the others."""
    inputs = target.inputs(Case(score, dtype, **MASKED[masked]))
    counts = testing.counted(inputs)
    empty = ~counts.any(dim=-1).expand(-1, inputs.grad_context.shape[1])
    assert empty.any() and not empty.all()
    got = target.run(inputs)
    query = "grad_query_proj" if score == "projected" else "grad_query"
    for name in ("context", "weights", query):
        assert not got[name][empty].any(), name
        assert got[name][~empty].any(dim=-1).all(), name
    assert not got["grad_memory"][empty.all(dim=1)].any()


@every_target
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_logsumexp_is_that_of_the_scores(dtype: torch.dtype, target: Target) -> None:
    """It is saved for the backward, which may run elsewhere: all backends agree on it."""
    inputs = target.inputs(Case("dot", dtype, lengths=True))
    query, memory = inputs.tensors["query"], inputs.tensors["memory"]
    lengths, wanted = inputs.masking.memory_lengths, {"return_logsumexp": True}
    with target.active(), testing.poisoned_empty():
        _, weights, logsumexp = torch.ops.fused_attn.dot_attention(
            query, memory, lengths, scale=inputs.scale, backend=target.backend, **wanted
        )
    scores = inputs.scale * torch.einsum("bte,bse->bts", query.double(), memory.double())
    expected = scores.masked_fill(~testing.counted(inputs), -INF).logsumexp(dim=-1)
    assert weights is None
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(logsumexp.double(), expected, rtol=tolerance, atol=tolerance)


def spoil_one_row(inputs: Inputs, name: str, value: float) -> tuple[Inputs, Tensor, Tensor]:
    """Put ``value`` into row 4 of batch 0, which only queries 1 and 3 look at, beside rows 2 to 5.

    Returns the inputs, and which queries (B, T) and memory rows (B, S) that may reach.
    """
    batch, queries, _ = inputs.grad_context.shape
    source = inputs.tensors["memory"].shape[1]
    looks = torch.zeros(queries, dtype=torch.bool)
    looks[[1, 3]] = True
    mask = torch.ones(batch, queries, source, dtype=torch.bool)
    mask[0, ~looks, 4] = False
    mask[0, looks, :2] = False
    mask[0, looks, 6:] = False
    bad = inputs.tensors[name].clone()
    bad[0, 4, 1] = value
    device = bad.device
    masking = inputs.masking._replace(memory_mask=mask.to(device))
    reached_queries = torch.zeros(batch, queries, dtype=torch.bool, device=device)
    reached_queries[0] = looks.to(device)
    reached_rows = torch.zeros(batch, source, dtype=torch.bool, device=device)
    reached_rows[0, 2:6] = True
    spoiled = replace(inputs, tensors=inputs.tensors | {name: bad}, masking=masking)
    return spoiled, reached_queries, reached_rows


@every_target
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=["nan", "inf", "minus_inf"])
@pytest.mark.parametrize(
    ("score", "spoiled"),
    [
        ("dot", "memory"),
        ("general", "memory"),
        ("concat", "memory"),
        ("projected", "memory"),
        ("projected", "memory_proj"),
    ],
)
def test_a_row_spoils_only_the_queries_that_look_at_it(
    score: str, spoiled: str, value: float, target: Target
) -> None:
    clean = target.inputs(Case(score, queries=6, source=9, memory_dim=17, attn_dim=19))
    bad, reached_queries, reached_rows = spoil_one_row(clean, spoiled, value)
    got = target.run(bad)
    clean = replace(clean, masking=bad.masking)
    oracle, plain = testing.oracle(clean), testing.plain(clean)
    query = "grad_query_proj" if score == "projected" else "grad_query"
    spared = {"context": ~reached_queries, "weights": ~reached_queries, query: ~reached_queries}
    spared |= {
        f"grad_{name}": ~reached_rows for name in ("memory", "memory_proj") if name in clean.tensors
    }
    for name, where in spared.items():
        testing.check_within_budget(name, got[name][where], oracle[name][where], plain[name][where])
    assert got["weights"][reached_queries].isnan().any(dim=-1).all()
    assert got["context"][reached_queries].isnan().all()


@every_target
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("score", SCORES)
def test_nan_that_counts_is_not_hidden(score: str, queries: int, target: Target) -> None:
    """And it stays in its row of the batch."""
    clean = target.inputs(Case(score, queries=queries))
    memory = clean.tensors["memory"].clone()
    memory[1, 3] = NAN
    got = target.run(replace(clean, tensors=clean.tensors | {"memory": memory}))
    expected = target.run(clean)
    # The scores of "projected" come from the projections, which are finite here.
    for name in ("context",) if score == "projected" else ("context", "weights", "grad_memory"):
        assert got[name][1].isnan().any()
        assert torch.equal(got[name][[0, 2]], expected[name][[0, 2]])


@every_target
@pytest.mark.parametrize("score", ["dot", "projected"])
def test_dropping_every_weight_keeps_the_alignment(score: str, target: Target) -> None:
    """The weights are returned before dropout; the sum is over what dropout keeps."""
    inputs = target.inputs(Case(score, keep=True))
    nothing = torch.zeros_like(inputs.masking.keep_mask)
    dropped = replace(inputs, masking=inputs.masking._replace(keep_mask=nothing, keep_scale=0.0))
    whole = replace(inputs, masking=inputs.masking._replace(keep_mask=None, keep_scale=1.0))
    got, expected = target.run(dropped), target.run(whole)
    assert not got["context"].any()
    assert torch.equal(got["weights"], expected["weights"])
    testing.check_results(got, testing.oracle(dropped), testing.plain(dropped))


@every_target
@pytest.mark.parametrize("dropout_p", [0.25, 0.9])
def test_dropout_keeps_the_mean(dropout_p: float, target: Target) -> None:
    """With a memory of ones the context is the sum of the kept weights: 1 on average."""
    query = torch.zeros(4, 16, 8, device=target.device)
    memory = torch.ones(4, 512, 8, device=target.device)
    torch.manual_seed(0)
    with target.active():
        context, weights = functional.dot_attention(
            query, memory, dropout_p=dropout_p, return_weights=True, backend=target.backend
        )
    # Each of the 64 sums has 512 terms of variance p / (1 - p); five deviations of their mean.
    deviation = (dropout_p / (1 - dropout_p) / 512 / 64) ** 0.5
    assert abs(float(context.mean()) - 1) < 5 * deviation
    assert float(context.std()) > 0
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 512))
