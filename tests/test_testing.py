"""The test tools themselves: wrong results fail, poison is detected, layouts keep values."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from fused_attn import testing
from fused_attn.testing import DTYPES, FLOORS, LAYOUTS, MASKS, SCORES, Case


def short(value: object) -> str:
    return str(value).removeprefix("torch.")


def test_floors_are_those_of_the_design() -> None:
    assert {short(dtype): floor for dtype, floor in FLOORS.items()} == {
        "float64": 1e-12,
        "float32": 1e-5,
        "float16": 1e-3,
        "bfloat16": 1e-2,
    }


def test_budget_is_twice_the_yardstick_and_the_floor_of_the_largest_value() -> None:
    oracle = torch.tensor([0.0, -4.0], dtype=torch.float64)
    plain = torch.tensor([0.25, -4.0])
    verdict = testing.judge(torch.tensor([0.5, -4.0]), oracle, plain)
    assert verdict == testing.Verdict(error=0.5, yardstick=0.25, budget=0.5 + 4e-5, largest=4.0)
    assert verdict.passed
    assert not testing.judge(torch.tensor([0.501, -4.0]), oracle, plain).passed
    assert testing.judge(torch.tensor([0.501, -4.0]), oracle, plain, scale=100.0).passed


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 2.001], ids=str)
def test_a_wrong_value_fails_and_says_where(value: float) -> None:
    oracle = torch.ones(2, 3, dtype=torch.float64)
    got = torch.ones(2, 3)
    got[1, 2] = value
    testing.check_within_budget("context", torch.ones(2, 3), oracle, torch.ones(2, 3))
    with pytest.raises(
        AssertionError, match=r"^context: error .* worst at \(1, 2\): expected 1, got "
    ):
        testing.check_within_budget("context", got, oracle, torch.ones(2, 3))


def test_a_useless_yardstick_fails_too() -> None:
    """A NaN in plain attention would otherwise allow everything."""
    right = torch.ones(3)
    with pytest.raises(AssertionError, match="exceeds the budget nan"):
        testing.check_within_budget("context", right, right.double(), right * torch.nan)


@pytest.mark.parametrize(
    ("got", "message"),
    [
        (torch.ones(3, 2), "expected (torch.float32, (2, 3)), got (torch.float32, (3, 2))"),
        (torch.ones(2, 3).half(), "got (torch.float16, (2, 3))"),
    ],
    ids=["shape", "dtype"],
)
def test_a_wrong_shape_or_dtype_fails(got: torch.Tensor, message: str) -> None:
    right = torch.ones(2, 3)
    with pytest.raises(AssertionError, match=re.escape(message)):
        testing.check_within_budget("context", got, right.double(), right)


def test_all_failures_come_in_one_message() -> None:
    right = {name: torch.ones(2) for name in ("context", "weights", "grad_query")}
    oracle = {name: tensor.double() for name, tensor in right.items()}
    wrong = right | {"context": torch.zeros(2), "grad_query": torch.zeros(2)}
    testing.check_results(right, oracle, right)
    with pytest.raises(AssertionError, match=r"(?s)^context: .*\ngrad_query: "):
        testing.check_results(wrong, oracle, right)
    missing = {name: right[name] for name in ("context", "weights")}
    with pytest.raises(AssertionError, match=r"expected the results .*'grad_query'"):
        testing.check_results(missing, oracle, right)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_poison_is_what_fresh_memory_holds(dtype: torch.dtype) -> None:
    like = torch.ones(2, 3, dtype=dtype)
    before = torch.are_deterministic_algorithms_enabled()
    with testing.poisoned_empty():
        fresh = [
            torch.empty(2, 3, dtype=dtype),
            torch.empty_like(like),
            like.new_empty(4),
            torch.empty_strided((2, 3), (1, 2), dtype=dtype),
        ]
    assert all(tensor.isnan().all() for tensor in fresh)
    assert torch.are_deterministic_algorithms_enabled() == before


def test_poison_ends_with_an_error() -> None:
    with pytest.raises(KeyError), testing.poisoned_empty():
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool, torch.int64], ids=short)
def test_layouts_keep_the_values_under_other_strides(dtype: torch.dtype, layout: str) -> None:
    tensor = (torch.arange(24).view(2, 3, 4) % 5).to(dtype)
    laid = testing.lay_out(tensor, layout)
    assert laid.dtype == dtype
    expected = tensor[:1].expand(2, 3, 4) if layout == "expanded" else tensor
    assert torch.equal(laid, expected)
    strides = {
        "contiguous": (12, 4, 1),
        "transposed": (4, 8, 1),
        "expanded": (0, 4, 1),
        "sliced": (24, 8, 2),
        "offset": (12, 4, 1),
    }
    assert laid.stride() == strides[layout]
    assert (laid.storage_offset() == 1) == (layout == "offset")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("score", SCORES)
def test_spoiling_touches_padding_only(score: str, mask: str) -> None:
    clean = testing.make_inputs(Case(score, lengths=True, mask=mask))
    padding = ~testing.counted(clean).any(dim=1)
    spoiled = testing.spoil_padding(clean, torch.nan)
    assert padding.any() and not padding.all()
    for name, tensor in clean.tensors.items():
        if name in ("memory", "memory_proj"):
            assert spoiled.tensors[name][padding].isnan().all()
            assert torch.equal(spoiled.tensors[name][~padding], tensor[~padding])
        else:
            assert torch.equal(spoiled.tensors[name], tensor)


def test_lengths_cover_all_nothing_and_between() -> None:
    inputs = testing.make_inputs(Case("dot", batch=4, source=9, lengths=True))
    lengths = inputs.masking.memory_lengths.tolist()
    assert {0, 9} < set(lengths) and all(0 <= length <= 9 for length in lengths)


def test_the_same_seed_draws_the_same_inputs() -> None:
    case = Case("concat", bias=True, lengths=True, mask="cube", keep=True)
    first, again = testing.make_inputs(case), testing.make_inputs(case)
    other = testing.make_inputs(case, seed=1)
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, again.tensors[name])
        assert not torch.equal(tensor, other.tensors[name])


@pytest.mark.parametrize("score", SCORES)
def test_yardstick_and_oracle_agree_in_float64(score: str) -> None:
    """They are independent implementations: bmm and softmax here, the reference there."""
    inputs = testing.make_inputs(
        Case(score, torch.float64, lengths=True, mask="cube", keep=True, bias=score == "concat")
    )
    plain, oracle = testing.plain(inputs), testing.oracle(inputs)
    assert plain.keys() == oracle.keys()
    for name in plain:
        torch.testing.assert_close(plain[name], oracle[name])


@pytest.mark.parametrize("score", SCORES)
def test_the_oracle_in_pieces_is_the_oracle(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = testing.make_inputs(Case(score, batch=5, lengths=True, mask="cube", keep=True))
    whole = testing.oracle(inputs)
    monkeypatch.setattr(testing, "_ORACLE_ELEMENTS", 1)
    for name, tensor in testing.oracle(inputs).items():
        torch.testing.assert_close(tensor, whole[name])


def test_oracle_takes_the_inputs_as_they_were_rounded() -> None:
    """The rounding of the inputs does not count as the kernel's error."""
    inputs = testing.make_inputs(Case("dot", torch.bfloat16))
    widened = {name: tensor.double() for name, tensor in inputs.tensors.items()}
    wide = replace(
        inputs,
        tensors=widened,
        grad_context=inputs.grad_context.double(),
        grad_weights=inputs.grad_weights.double(),
    )
    for name, tensor in testing.oracle(inputs).items():
        assert torch.equal(tensor, testing.oracle(wide)[name])


def test_a_case_names_itself() -> None:
    case = Case("concat", torch.bfloat16, 2, 3, 4, 5, 6, 7, lengths=True, mask="cube", keep=True)
    assert str(case) == "concat-bfloat16-B2T3S4E6D5A7-lengths-keep-cube_mask"
    assert str(Case("dot", layout="sliced", weights=False)) == (
        "dot-float32-B3T5S9E16-no_weights-sliced"
    )
