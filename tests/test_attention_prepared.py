"""Prepared memories give the same results and gradients with less work; beams."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re

import pytest
import torch
from targets import Target, every_target
from torch import Tensor

from fused_attn import LuongAttention, PreparedMemory, backends
from fused_attn.testing import FLOORS

B, T, S, D, E, A = 3, 4, 6, 8, 16, 32
SCORES = ("dot", "general", "concat")
LENGTHS = torch.tensor([S, 0, 4])
DTYPES = tuple(FLOORS)


def make(score: str, target: Target | None = None, **options: object) -> LuongAttention:
    torch.manual_seed(0)
    widths = {"attn_dim": A} if score == "concat" else {}
    where = {"backend": target.backend, "device": target.device} if target else {}
    return LuongAttention(E if score == "dot" else D, E, score, **widths, **where, **options)


def draw(score: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(B, T, E if score == "dot" else D, generator=generator)
    memory = torch.randn(B, S, E, generator=generator)
    mask = torch.rand(B, T, S, generator=generator) > 0.3
    return query.to(device, dtype), memory.to(device, dtype), mask.to(device)


@every_target
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("score", SCORES)
def test_prepared_gives_what_unprepared_gives(
    score: str, dtype: torch.dtype, target: Target
) -> None:
    module = make(score, target, output_dim=5, dtype=dtype)
    query, memory, mask = draw(score, dtype, target.device)
    lengths = LENGTHS.to(target.device)
    with target.active():
        expected = module(query, memory, lengths, mask)
        got = module(query, module.prepare_memory(memory, lengths, mask))
    tolerance = 2 * FLOORS[dtype]
    for result, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=0.0, atol=tolerance)


@every_target
@pytest.mark.parametrize("score", SCORES)
def test_gradients_of_steps_add_up_to_those_of_one_call(score: str, target: Target) -> None:
    """A decoder loop with a prepared memory, against one call with all steps and the memory."""
    module = make(score, target, dtype=torch.float64)
    query, memory, _ = draw(score, torch.float64, target.device)
    lengths = LENGTHS.to(target.device)
    leaves = [query.requires_grad_(), memory.requires_grad_(), *module.parameters()]
    with target.active():
        context, weights = module(query, memory, lengths)
        loss = context.square().sum() + weights.square().sum()
        expected = torch.autograd.grad(loss, leaves)
        prepared = module.prepare_memory(memory, lengths)
        loss = torch.zeros((), dtype=torch.float64, device=target.device)
        for t in range(T):
            context, weights = module(query[:, t], prepared)
            loss = loss + context.square().sum() + weights.square().sum()
        got = torch.autograd.grad(loss, leaves)
    for gradient, wanted in zip(got, expected, strict=True):
        assert wanted.any()
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)


@every_target
@pytest.mark.parametrize("score", SCORES)
def test_beams_share_one_memory(score: str, target: Target) -> None:
    """A query (B, K, D) on (B, S, E) gives the same as repeating each memory K times."""
    beams = 5
    module = make(score, target)
    _, memory, _ = draw(score, device=target.device)
    lengths = LENGTHS.to(target.device)
    query = torch.randn(B, beams, module.query_dim).to(target.device)
    with target.active():
        context, weights = module(query, module.prepare_memory(memory, lengths))
        repeated = memory.repeat_interleave(beams, dim=0)
        expected = module(query.flatten(0, 1), repeated, lengths.repeat_interleave(beams))
    torch.testing.assert_close(context.flatten(0, 1), expected[0])
    torch.testing.assert_close(weights.flatten(0, 1), expected[1])


@pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1], [0, 0, 2, 2, 1], []], ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_index_select_reorders_everything(score: str, rows: list[int]) -> None:
    module = make(score)
    query, memory, mask = draw(score)
    index = torch.tensor(rows, dtype=torch.int64)
    picked = module.prepare_memory(memory, LENGTHS, mask).index_select(index)
    expected = module(query[index], memory[index], LENGTHS[index], mask[index])
    got = module(query[index], picked)
    for result, wanted in zip(got, expected, strict=True):
        assert result.shape[0] == len(rows)
        torch.testing.assert_close(result, wanted)


def test_index_select_passes_gradients_on() -> None:
    module = make("concat")
    query, memory, _ = draw("concat")
    memory.requires_grad_()
    index = torch.tensor([2, 2])
    context, _ = module(query[:2], module.prepare_memory(memory).index_select(index))
    (grad,) = torch.autograd.grad(context.sum(), memory)
    assert grad[2].any() and not grad[:2].any()


@pytest.mark.parametrize("rows", [[0, 1], torch.ones(2), torch.ones(1, 2).long(), None], ids=repr)
def test_index_select_refuses_what_is_no_index(rows: object) -> None:
    prepared = make("dot").prepare_memory(draw("dot")[1])
    with pytest.raises(TypeError, match=r"rows must be an integer Tensor of shape \(N,\), got"):
        prepared.index_select(rows)


@pytest.mark.parametrize("score", SCORES)
def test_what_is_prepared(score: str) -> None:
    """A decoding step of the concat score computes neither projection nor exponentials."""
    module = make(score)
    _, memory, mask = draw(score)
    prepared = module.prepare_memory(memory, LENGTHS.int(), mask[:, 0])
    assert isinstance(prepared, PreparedMemory) and prepared.score == score
    assert prepared.memory is memory
    assert torch.equal(prepared.memory_lengths, LENGTHS)
    assert torch.equal(prepared.memory_mask, mask[:, :1])
    if score != "concat":
        assert prepared.memory_proj is None and prepared.memory_exp is None
        return
    counts = (torch.arange(S) < LENGTHS[:, None]) & mask[:, 0]
    projection = memory @ module.memory_proj.weight.T
    torch.testing.assert_close(prepared.memory_proj[counts], projection[counts])
    torch.testing.assert_close(prepared.memory_exp[counts], torch.exp(2 * projection[counts]))
    assert not prepared.memory_exp.requires_grad


def test_it_is_a_value() -> None:
    prepared = make("concat").prepare_memory(draw("concat")[1], LENGTHS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        prepared.memory = None
    detached = dataclasses.replace(
        prepared,
        memory_proj=prepared.memory_proj.detach(),
    )
    for other in (copy.deepcopy(detached), pickle.loads(pickle.dumps(detached))):
        assert torch.equal(other.memory_exp, prepared.memory_exp)
        assert torch.equal(other.memory_lengths, LENGTHS)


def test_nothing_is_kept_on_the_module() -> None:
    module = make("concat")
    query, memory, _ = draw("concat")
    before = set(vars(module)) | set(dict(module.named_buffers()))
    module(query, module.prepare_memory(memory, LENGTHS))
    assert set(vars(module)) | set(dict(module.named_buffers())) == before
    # Preparing a second memory does not change the results of the first.
    first, second = module.prepare_memory(memory), module.prepare_memory(memory + 1)
    expected = module(query, memory)[0]
    module(query, second)
    torch.testing.assert_close(module(query, first)[0], expected)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_prepared_under_autocast(score: str, dtype: torch.dtype) -> None:
    """Prepared inside or outside of autocast, used inside."""
    module = make(score)
    query, memory, _ = draw(score)
    expected, _ = module(query, memory, LENGTHS)
    outside = module.prepare_memory(memory, LENGTHS)
    with torch.autocast("cpu", dtype=dtype):
        inside = module.prepare_memory(memory, LENGTHS)
        contexts = [module(query, prepared)[0] for prepared in (inside, outside)]
    for context in contexts:
        assert context.dtype == dtype
        torch.testing.assert_close(context.float(), expected, rtol=0.0, atol=0.05)


@pytest.mark.parametrize(
    "masking",
    [{"memory_lengths": LENGTHS}, {"memory_mask": torch.ones(B, S) > 0}],
    ids=["lengths", "mask"],
)
def test_masking_belongs_to_the_preparation(masking: dict[str, Tensor]) -> None:
    module = make("general")
    query, memory, _ = draw("general")
    with pytest.raises(ValueError, match="memory_lengths and memory_mask must be None if memory"):
        module(query, module.prepare_memory(memory), **masking)


def test_prepared_for_another_score() -> None:
    query, memory, _ = draw("general")
    prepared = make("concat").prepare_memory(memory)
    message = "memory was prepared for the score 'concat', expected 'general'"
    with pytest.raises(ValueError, match=message):
        make("general")(query, prepared)


BAD = [
    ("memory", torch.ones(B, S, E + 1), ValueError, f"memory must have shape (B, S, {E})"),
    ("memory", None, TypeError, "memory must be a Tensor, got NoneType"),
    ("memory_lengths", torch.ones(B), TypeError, "memory_lengths must be an integer Tensor"),
    ("memory_lengths", torch.ones(2).long(), ValueError, "memory_lengths must have shape (B,)"),
    ("memory_mask", torch.ones(B, S), TypeError, "memory_mask must be a bool Tensor"),
    ("memory_mask", torch.ones(B, S + 1) > 0, ValueError, "memory_mask must have shape (B, S)"),
]


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [pytest.param(*row, id=f"{row[0]}-{i}") for i, row in enumerate(BAD)],
)
def test_bad_argument(name: str, value: object, error: type[Exception], message: str) -> None:
    arguments = {"memory": draw("general")[1]} | {name: value}
    with pytest.raises(error, match=re.escape(message)):
        make("general").prepare_memory(**arguments)


def test_length_out_of_range_shows_in_the_step_at_the_latest() -> None:
    module = make("general")
    query, memory, _ = draw("general")
    with pytest.raises(ValueError, match=re.escape("memory_lengths must lie in 0..6")):
        module(query, module.prepare_memory(memory, torch.tensor([1, 2, S + 1])))


def test_mask_per_step_must_fit_the_steps() -> None:
    module = make("general")
    query, memory, mask = draw("general")
    prepared = module.prepare_memory(memory, memory_mask=mask)
    module(query, prepared)
    with pytest.raises(ValueError, match="memory_mask must have shape"):
        module(query[:, 0], prepared)


@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
@pytest.mark.parametrize("score", ["dot", "general", "concat"])
def test_warming_up_runs_everything_and_changes_nothing(
    score: str, prepared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    backend = backends.load("eager")
    for name in ("dot_forward", "dot_backward", "concat_forward", "concat_backward"):
        run = getattr(backend, name)
        monkeypatch.setattr(backend, name, lambda *a, n=name, f=run: (ran.append(n), f(*a))[1])
    module = LuongAttention(6, score=score, dropout=0.5, output_dim=5, backend="eager")
    query, memory = torch.randn(2, 3, 6, requires_grad=True), torch.randn(2, 4, 6)
    lengths = torch.tensor([4, 2])
    arguments = (module.prepare_memory(memory, lengths),) if prepared else (memory, lengths)
    state = torch.get_rng_state()
    module.warm_up(query, *arguments)
    assert torch.equal(torch.get_rng_state(), state)
    assert query.grad is None and all(p.grad is None for p in module.parameters())
    kind = "concat" if score == "concat" else "dot"
    assert ran == [f"{kind}_forward", f"{kind}_backward", f"{kind}_backward"]
    ran.clear()
    with torch.no_grad():
        module.warm_up(query, *arguments, return_weights=False)
    assert ran == [f"{kind}_forward"]


def test_warming_up_refuses_what_forward_refuses() -> None:
    module = LuongAttention(6)
    with pytest.raises(ValueError, match="query must have shape"):
        module.warm_up(torch.randn(2, 3, 7), torch.randn(2, 4, 6))
    with pytest.raises(TypeError, match="memory must be a Tensor, got str"):
        module.warm_up(torch.randn(2, 3, 6), "memory")
