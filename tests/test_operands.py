"""Every operator of every backend refuses mismatched operands, with their name in the message."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from targets import Target, every_target
from torch import Tensor

from fused_attn import backends, ops
from fused_attn.attention import LuongAttention
from fused_attn.prepared import exponentials

B, T, S, E, A, D = 2, 3, 5, 4, 6, 8
OPERATORS = (
    "dot_forward", "dot_backward", "concat_forward", "concat_backward", "concat_scores",
    "concat_scores_backward",
)  # fmt: skip
SHAPES = {
    "query": (B, T, E), "query_proj": (B, T, A), "memory": (B, S, E), "memory_proj": (B, S, A),
    "memory_exp": (B, S, A), "v": (A,), "memory_lengths": (B,), "memory_mask": (B, T, S),
    "keep_mask": (B, T, S), "centers": (B, T), "grad_context": (B, T, E),
    "grad_weights": (B, T, S), "context": (B, T, E), "weights": (B, T, S), "logsumexp": (B, T),
    "grad_scores": (B, T, S), "grad_logsumexp": (B, T),
}  # fmt: skip
DTYPES = {"memory_lengths": torch.int64, "memory_mask": torch.bool, "keep_mask": torch.bool}
# The names of operands in messages: native code has one name for both kinds of query.
NAMES = {"query_proj": "query(_proj)?", "centers": r"window\.centers"}
ANY = r"^[\w.]+( and \w+)? must |no backend can do|^a memory \(rows, E\) needs"
FREE = (f"{E - 1} in dimension 2", f"{E + 1} in dimension 2")  # concat: any memory width is valid


def operands(operator: str, device: str, seed: bool = False) -> dict[str, Any]:
    """All operands of the operator; ``seed`` adds a gradient of the log-sum-exp."""
    generator = torch.Generator().manual_seed(0)

    def made(*names: str) -> dict[str, Any]:
        return {
            name: (torch.rand(SHAPES[name], generator=generator) + 0.5).to(
                device, DTYPES.get(name, torch.float32)
            )
            for name in names
        }

    found: dict[str, Any] = {}
    if operator == "concat_scores_backward":
        found |= made("grad_scores")
    elif operator.endswith("backward"):
        found |= made("grad_context", "grad_weights", "context", "weights", "logsumexp")
        found["grad_logsumexp"] = made("grad_logsumexp")["grad_logsumexp"] if seed else None
    if operator.startswith("dot"):
        found |= made("query", "memory")
    else:
        found |= made("query_proj", "memory_proj", "v")
        found["memory_exp"] = exponentials(found["memory_proj"])
        found |= {} if "scores" in operator else made("memory")
    found |= made("memory_lengths", "memory_mask")
    if "scores" not in operator:
        found |= made("keep_mask", "centers") | {"half_width": 2.0, "gaussian": True}
    if operator.endswith("backward"):
        count = {"dot_backward": 3, "concat_backward": 5}.get(operator, 3)
        found["wanted"] = [True] * count
    return found


def unfit(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Copies of a tensor with another rank, size, dtype or device."""
    yield "one dimension more", tensor.unsqueeze(0)
    yield "one dimension less", tensor[0]
    for dim, size in enumerate(tensor.shape):
        for wrong in (0, size - 1, size + 1):
            shape = [*tensor.shape]
            shape[dim] = wrong
            yield f"{wrong} in dimension {dim}", tensor.new_zeros(shape)
    is_bool = tensor.dtype == torch.bool
    yield "another dtype", tensor.to(torch.uint8 if is_bool else torch.float64)
    yield "another device", tensor.to("meta")


@every_target
@pytest.mark.parametrize("operator", OPERATORS)
def test_operands_that_do_not_fit_are_named(operator: str, target: Target) -> None:
    if target.backend == "cuda":
        pytest.skip("csrc/call.h checks the operands of both the cuda and the cpu backend")
    given = operands(operator, target.device)
    call = getattr(ops, operator)
    call(**given, backend=target.backend)  # the unchanged operands are accepted
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            continue
        pattern = NAMES.get(name, name)
        if name.startswith(("query", "memory")) and not name.startswith("memory_l"):
            pattern = ""  # the others are compared with these, so the message may name any of them
        for what, wrong in unfit(tensor):
            if operator == "concat_forward" and name == "memory" and what in FREE:
                continue
            if what == "another device" and target.backend == "cpu":
                with pytest.raises((RuntimeError, ValueError), match=r"on meta|has no memory"):
                    call(**given | {name: wrong}, backend=target.backend)
                continue
            with pytest.raises((ValueError, TypeError)) as error:
                call(**given | {name: wrong}, backend=target.backend)
            # The backend is chosen by the device and dtype of the memory, so it may refuse first.
            expected = rf"^{pattern} must " if pattern else ANY
            assert re.search(expected, str(error.value)), f"{name}, {what}: {error.value}"


@every_target
def test_a_mask_may_be_the_same_for_all_queries(target: Target) -> None:
    if target.backend == "cuda":
        pytest.skip("the cuda backend has no windows")
    given = operands("dot_forward", target.device)
    for mask in (given["memory_mask"][:, :1], given["memory_mask"][:, 0]):
        ops.dot_forward(**given | {"memory_mask": mask}, backend=target.backend)


@pytest.mark.parametrize("operator", ["dot_backward", "concat_backward"])
def test_a_gradient_of_the_log_sum_exp_is_checked(operator: str) -> None:
    given = operands(operator, "cpu", seed=True)
    call = getattr(ops, operator)
    call(**given)
    for name, tensor in given.items():
        if name.startswith("grad_"):
            for what, wrong in unfit(tensor):
                with pytest.raises((ValueError, TypeError), match=f"^{name} must "):
                    call(**given | {name: wrong})
                    pytest.fail(what)


UNFIT_ROWS = {
    "memory_lengths": (torch.tensor([0, 4, 9, 10]), "offsets must have shape (3,), got (4,)"),
    "memory_proj": (torch.zeros(8, A), "memory_proj must have shape (9, 6), got (8, 6)"),
    "memory_exp": (torch.zeros(9, A + 1), "memory_exp must have shape (9, 6), got (9, 7)"),
    "memory": (torch.zeros(B, 9, E), "query and memory must have shapes (B, T, K) and (N, E)"),
}


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("name", UNFIT_ROWS)
def test_rows_of_sequences_that_do_not_fit(name: str, backend: str) -> None:
    """A ragged memory is padded for backends that take no offsets, after these checks."""
    if reasons := backends.unavailable_reasons(backend):
        pytest.skip("; ".join(reasons))
    given = operands("concat_forward", "cpu")
    for option in ("keep_mask", "centers", "half_width", "gaussian", "memory_mask"):
        del given[option]
    given |= {"memory": torch.zeros(9, E), "memory_proj": torch.zeros(9, A)}
    given |= {"memory_exp": torch.ones(9, A), "memory_lengths": torch.tensor([0, 4, 9])}
    ops.concat_forward(**given, max_source=S, backend=backend)
    wrong, message = UNFIT_ROWS[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.concat_forward(**given | {name: wrong}, max_source=S, backend=backend)


@every_target
def test_a_prepared_memory_that_was_filled_wrongly(target: Target) -> None:
    """With fewer projected rows than memory rows, nothing is read past the end."""
    layer = LuongAttention(D, E, "concat", attn_dim=A, backend=target.backend)
    layer = layer.to(target.device)
    memory, query = torch.zeros(B, S, E), torch.zeros(B, T, D)
    prepared = layer.prepare_memory(memory.to(target.device))
    short = replace(prepared, memory_proj=prepared.memory_proj[:, :-1], memory_exp=None)
    with torch.no_grad(), pytest.raises(ValueError, match=r"^memory_proj must have shape"):
        layer(query.to(target.device), short)
