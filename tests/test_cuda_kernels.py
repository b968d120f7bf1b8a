"""The CUDA kernels' own source against the fp64 oracle, run on the CPU; see cuda_on_host.py.

What only a GPU can show is not shown here: that memory is ordered between its blocks as
`__threadfence` says, and how fast any of it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import cuda_on_host
import pytest
import torch
from cuda_on_host import Call
from torch import Tensor

from fused_attn import testing
from fused_attn.prepared import exponentials
from fused_attn.reference import Masking
from fused_attn.testing import Case, Inputs

NAN, INF = torch.nan, torch.inf
SCORES = ("dot", "projected")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MASKED = {"lengths": True, "mask": "cube", "keep": True}
# (T, S, E, A): every kernel (by E, and T = 1 or more), odd widths and those of 16 bytes, one row,
# fewer rows than warps, several turns of every warp.
SIZES = {
    "ones": (1, 1, 1, 1),
    "odd": (1, 37, 17, 37),
    "narrow": (8, 9, 7, 300),
    "vectors": (5, 70, 128, 64),
    "full_8": (1, 100, 256, 256),
    "full_8_beam": (4, 50, 256, 8),
    "odd_16": (1, 33, 257, 511),
    "full_16": (1, 300, 512, 512),
    "full_16_beam": (6, 40, 512, 520),
    "odd_32": (1, 20, 1000, 1000),
    "full_32_beam": (3, 70, 1024, 1024),
    "odd_64": (1, 12, 1025, 1),
    "full_64_beam": (2, 19, 2048, 2048),
}
pytestmark = pytest.mark.skipif(
    not cuda_on_host.COMPILER, reason="no C++ compiler to run the kernels on the host"
)
Run = Callable[..., dict[str, Tensor]]


def short(value: object) -> str:
    return str(value).removeprefix("torch.")


@pytest.fixture(scope="session")
def call(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Call]:
    library = cuda_on_host.library(tmp_path_factory.mktemp("cuda_on_host"))
    return lambda **options: Call(library, **options)


def operands(inputs: Inputs) -> dict[str, Tensor]:
    """As csrc/module.cpp hands them on: of unit stride in the last dimension."""
    tensors = {name: t if t.stride(-1) == 1 else t.contiguous() for name, t in
               inputs.tensors.items()}  # fmt: skip
    if inputs.score == "dot":
        return tensors
    tensors["query"] = tensors.pop("query_proj")
    tensors["memory_exp"] = exponentials(tensors["memory_proj"])
    return tensors


def run(call: Call, inputs: Inputs) -> dict[str, Tensor]:
    """Context, weights and log-sum-exp, by name."""
    results = call.run(operands(inputs), inputs.scale, inputs.masking)
    return dict(zip(("context", "weights", "logsumexp"), results, strict=True))


def check(got: dict[str, Tensor], inputs: Inputs) -> None:
    found = {name: got[name] for name in ("context", "weights")}
    oracle, plain = testing.oracle(inputs), testing.plain(inputs)
    testing.check_results(found, {name: oracle[name] for name in found}, plain)
    check_logsumexp(got["logsumexp"], inputs)


def check_logsumexp(got: Tensor, inputs: Inputs) -> None:
    tensors = {name: t.double() for name, t in inputs.tensors.items()}
    if inputs.score == "dot":
        scores = inputs.scale * tensors["query"] @ tensors["memory"].mT
    else:
        sums = tensors["query_proj"][:, :, None] + tensors["memory_proj"][:, None]
        scores = torch.tanh(sums) @ tensors["v"]
    expected = scores.masked_fill(~testing.counted(inputs), -INF).logsumexp(dim=-1)
    # Exponentials in bfloat16 move a score by as much as their rounding moves the projection.
    coarse = inputs.score == "projected" and inputs.tensors["v"].dtype == torch.bfloat16
    tolerance = testing.FLOORS[torch.bfloat16 if coarse else torch.float32]
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def sized(score: str, dtype: torch.dtype, name: str, **options: object) -> Inputs:
    queries, source, memory_dim, attn_dim = SIZES[name]
    width = {"memory_dim": memory_dim, "attn_dim": attn_dim}
    return testing.make_inputs(Case(score, dtype, 3, queries, source, **width, **options))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("score", SCORES)
def test_sizes(score: str, dtype: torch.dtype, size: str, splits: int, call: Run) -> None:
    inputs = sized(score, dtype, size)
    check(run(call(splits=splits, guarded=True), inputs), inputs)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("size", ["odd", "narrow", "vectors", "full_16_beam"])
@pytest.mark.parametrize("keep", [False, True], ids=["", "keep"])
@pytest.mark.parametrize("mask", testing.MASKS)
@pytest.mark.parametrize("lengths", [False, True], ids=["", "lengths"])
@pytest.mark.parametrize("score", SCORES)
def test_masks(
    score: str, lengths: bool, mask: str, keep: bool, size: str, splits: int, call: Run
) -> None:
    inputs = sized(score, torch.float32, size, lengths=lengths, mask=mask, keep=keep)
    check(run(call(splits=splits, guarded=True), inputs), inputs)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("size", ["vectors", "full_16", "odd_16"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("score", SCORES)
def test_layouts(score: str, dtype: torch.dtype, size: str, layout: str, call: Run) -> None:
    """Aligned to 16 bytes or to nothing, and batch and row strides of any order."""
    inputs = sized(score, dtype, size, layout=layout, **MASKED)
    check(run(call(splits=2, guarded=True), inputs), inputs)


@pytest.mark.parametrize("offset", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_every_alignment_and_row_stride(dtype: torch.dtype, offset: int, call: Run) -> None:
    """Rows that start anywhere: the wide loads are taken only where each row is aligned."""
    inputs = sized("projected", dtype, "full_8")
    expected = run(call(), inputs)
    tensors = dict(inputs.tensors)
    for name in ("memory", "memory_proj"):
        wider = torch.full((*tensors[name].shape[:2], 256 + offset), NAN, dtype=dtype)
        wider[..., offset:] = tensors[name]
        tensors[name] = wider[..., offset:]
    moved = replace(inputs, tensors=tensors)
    p = operands(moved)
    p["memory_exp"] = wider_exponentials(tensors["memory_proj"], offset)
    got = call(splits=1).run(p, 1.0, moved.masking)
    for tensor, wanted in zip(got, expected.values(), strict=True):
        assert torch.equal(tensor, wanted)


def wider_exponentials(memory_proj: Tensor, offset: int) -> Tensor:
    exp = exponentials(memory_proj)
    wider = torch.full((*exp.shape[:2], exp.shape[2] + offset), NAN, dtype=exp.dtype)
    wider[..., offset:] = exp
    return wider[..., offset:]


@pytest.mark.parametrize("value", [NAN, INF], ids=["nan", "inf"])
@pytest.mark.parametrize("mask", testing.MASKS)
@pytest.mark.parametrize("size", ["odd", "vectors", "full_64_beam"])
@pytest.mark.parametrize("score", SCORES)
def test_padding_changes_no_bit(score: str, size: str, mask: str, value: float, call: Run) -> None:
    clean = sized(score, torch.float32, size, lengths=True, mask=mask, keep=True)
    spoiled = testing.spoil_padding(clean, value)
    expected, got = run(call(splits=2), clean), run(call(splits=2), spoiled)
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("score", SCORES)
def test_nothing_to_attend_to(score: str, dtype: torch.dtype, call: Run) -> None:
    inputs = sized(score, dtype, "vectors", **MASKED)
    empty = ~testing.counted(inputs).any(dim=-1)
    got = run(call(splits=2), inputs)
    assert empty.any() and not empty.all()
    assert not got["context"][empty].any() and not got["weights"][empty].any()
    assert (got["logsumexp"] == -INF).equal(empty)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=["nan", "inf", "minus_inf"])
@pytest.mark.parametrize(
    ("score", "name"),
    [("dot", "memory"), ("projected", "memory"), ("projected", "memory_proj")],
)
def test_a_row_spoils_only_the_queries_that_look_at_it(
    score: str, name: str, value: float, splits: int, call: Run
) -> None:
    inputs = sized(score, torch.float32, "vectors")
    batch, queries, _ = inputs.grad_context.shape
    looks = torch.tensor([False, True, False, True, False])
    mask = torch.ones(batch, queries, 70, dtype=torch.bool)
    mask[0, ~looks, 4] = False
    mask[0, looks, 6:] = False
    inputs = replace(inputs, masking=Masking(None, mask))
    bad = inputs.tensors[name].clone()
    bad[0, 4, 1] = value
    expected = run(call(splits=splits), inputs)
    got = run(call(splits=splits), replace(inputs, tensors=inputs.tensors | {name: bad}))
    for result in got:
        assert torch.equal(got[result][0, ~looks], expected[result][0, ~looks]), result
        assert torch.equal(got[result][1:], expected[result][1:]), result
    assert got["context"][0, looks].isnan().all()
    assert got["weights"][0, looks][:, :6].isnan().all()
    assert not got["weights"][0, looks][:, 6:].any()


@pytest.mark.parametrize("score", SCORES)
def test_nan_that_counts_is_not_hidden(score: str, call: Run) -> None:
    inputs = sized(score, torch.float32, "vectors")
    expected = run(call(splits=2), inputs)
    memory = inputs.tensors["memory"].clone()
    memory[1, 3] = NAN
    got = run(call(splits=2), replace(inputs, tensors=inputs.tensors | {"memory": memory}))
    assert got["context"][1].isnan().all()
    assert torch.equal(got["context"][[0, 2]], expected["context"][[0, 2]])
    if score == "dot":
        assert got["weights"][1].isnan().all()


@pytest.mark.parametrize("splits", [0, 1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("score", SCORES)
def test_order_changes_no_bit(score: str, dtype: torch.dtype, splits: int, call: Run) -> None:
    """Of blocks, and of the threads in them: whichever is last to arrive merges the same way."""
    case = Case(score, dtype, 3, 5, 300, memory_dim=96, attn_dim=40, **MASKED)
    inputs = testing.make_inputs(case)
    expected = run(call(splits=splits, multiprocessors=16), inputs)
    check(expected, inputs)
    for seed in range(1, 5):
        got = run(call(splits=splits, multiprocessors=16, seed=seed), inputs)
        for name in expected:
            assert torch.equal(got[name], expected[name]), name


def test_results_not_asked_for_are_not_written(call: Run) -> None:
    inputs = sized("dot", torch.float32, "vectors", **MASKED)
    expected = run(call(splits=2), inputs)
    for weights, logsumexp in ((False, False), (True, False), (False, True)):
        wanted = {"return_weights": weights, "return_logsumexp": logsumexp}
        found = call(splits=2, guarded=True).run(
            operands(inputs), inputs.scale, inputs.masking, **wanted
        )
        for got, value in zip(found, expected.values(), strict=True):
            assert got is None or torch.equal(got, value)
        assert [got is None for got in found] == [False, not weights, not logsumexp]


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=short
)
def test_lengths_of_every_type_are_clamped(dtype: torch.dtype, call: Run) -> None:
    inputs = sized("dot", torch.float32, "vectors")
    below = 255 if dtype == torch.uint8 else -3
    given = torch.tensor([below, 99, 41, 99, 99]).to(dtype)[:3]
    right = torch.tensor([70 if dtype == torch.uint8 else 0, 70, 41])
    for lengths in (given, given.repeat_interleave(2)[::2]):
        got = run(call(), replace(inputs, masking=Masking(lengths)))
        expected = run(call(), replace(inputs, masking=Masking(right)))
        for name in expected:
            assert torch.equal(got[name], expected[name]), name


# What is added to W_q h_t and W_m h_s; beyond 43 there are no factors, and a pair of terms whose
# factors are at the ends of their range meets the cut.
SHIFTS = [
    (0.0, 0.0), (11.0, 11.0), (-11.0, -11.0), (22.5, 0.0), (25.0, 25.0), (-25.0, -25.0),
    (42.0, -42.0), (-42.0, 42.0), (40.0, 40.0), (-40.0, -40.0), (44.0, 0.0), (0.0, 44.0),
    (0.0, -44.0), (60.0, -60.0), (-60.0, 60.0), (1e4, 0.0), (-1e4, 0.0), (0.0, 1e4),
    (0.0, -1e4), (1e4, -1e4), (-1e4, 1e4), (1e4, 1e4),
]  # fmt: skip


@pytest.mark.parametrize("columns", [slice(None), slice(0, None, 3)], ids=["all", "some"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shift", SHIFTS, ids=lambda shift: f"{shift[0]:+g}_{shift[1]:+g}")
def test_concat_of_every_size(
    shift: tuple[float, float], dtype: torch.dtype, columns: slice, call: Run
) -> None:
    case = Case("projected", dtype, 2, 5, 19, memory_dim=17, attn_dim=37, lengths=True)
    inputs = testing.make_inputs(case)
    tensors = dict(inputs.tensors)
    for name, by in zip(("query_proj", "memory_proj"), shift, strict=True):
        tensors[name] = tensors[name].clone()
        tensors[name][..., columns] += by
    inputs = replace(inputs, tensors=tensors)
    check(run(call(), inputs), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("size", ["odd", "vectors"])
def test_concat_of_every_size_in_one_row(size: str, dtype: torch.dtype, call: Run) -> None:
    """Some queries and some rows have factors, others not."""
    inputs = sized("projected", dtype, size, mask="cube")
    generator = torch.Generator().manual_seed(1)
    tensors = dict(inputs.tensors)
    for name in ("query_proj", "memory_proj"):
        sizes = torch.tensor([0.0] * 60 + [20.0, 60.0, 100.0, 1e4])
        picked = torch.randint(len(sizes), tensors[name].shape, generator=generator)
        sign = torch.randint(2, tensors[name].shape, generator=generator) * 2 - 1
        tensors[name] = tensors[name] + (sign * sizes[picked]).to(dtype)
    inputs = replace(inputs, tensors=tensors)
    check(run(call(splits=2), inputs), inputs)


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["plus", "minus"])
def test_scores_at_the_end_of_the_range(sign: float, call: Run) -> None:
    inputs = testing.make_inputs(Case("dot", queries=2, source=5, memory_dim=4))
    tensors = {
        "memory": torch.full_like(inputs.tensors["memory"], 1e18),
        "query": torch.full_like(inputs.tensors["query"], sign * 1e19),
    }
    got = run(call(), replace(inputs, tensors=tensors, scale=1.0))
    torch.testing.assert_close(got["context"], torch.full_like(got["context"], 1e18))
    torch.testing.assert_close(got["weights"], torch.full_like(got["weights"], 0.2))


def test_a_source_without_positions(call: Run) -> None:
    inputs = testing.make_inputs(Case("dot", queries=3, source=0))
    got = run(call(), inputs)
    assert not got["context"].any() and (got["logsumexp"] == -INF).all()


def test_float16_converts_like_torch(call: Run) -> None:
    """The stand-in's conversions; a GPU has instructions for them. Every float16, and ties."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    finite = every[every.isfinite()][: 63486 // 2 * 2]
    memory = finite.view(1, 1, -1)[:, :, : len(finite) // 2048 * 2048].view(-1, 1, 2048)
    query = torch.zeros(len(memory), 1, 2048, dtype=torch.float16)
    context, _, _ = call().run({"query": query, "memory": memory}, 1.0, Masking())
    assert torch.equal(context, memory)
    # The mean of two neighbours is a tie, which goes to the even one.
    pairs = torch.stack((memory[3], memory[3].view(torch.int16).add(1).view(torch.float16)), dim=1)
    context, _, _ = call().run({"query": query[:1], "memory": pairs}, 1.0, Masking())
    assert torch.equal(context, pairs.float().mean(dim=1, keepdim=True).half())
