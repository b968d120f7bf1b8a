"""The targets of the backend tests: each backend, on each device and instruction set usable here.

A backend that cannot run on this machine is one skipped target with its reason. A call that a
usable backend refuses is also a test: it must raise, with the reason in the message.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch

from fused_attn import backends, ops, testing
from fused_attn.problem import AttentionProblem
from fused_attn.testing import Case, Inputs, Tensors

# Backends without a backward: the eager backend computes the gradients from what they saved.
FORWARD_ONLY = ("cuda",)
# Backends that refuse some dtypes or sizes that others support; `check` tests the refusals.
PARTIAL = ("cuda", "triton")
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


@dataclass(frozen=True)
class Target:
    backend: str
    device: str
    isa: str | None = None  # of the cpu backend

    def __str__(self) -> str:
        words = [self.backend, self.isa, self.device if self.device != "cpu" else None]
        return "_".join(filter(None, words))

    @contextmanager
    def active(self) -> Iterator[None]:
        """A context that sets this target's instruction set, or provides a backward.

        A call that a partial backend refuses skips the test, because `check` tests refusals.
        """
        with self._settings():
            try:
                yield
            except Exception as error:  # torch's opcheck wraps it in its own exception
                if self.backend not in PARTIAL or "no backend can do" not in str(error):
                    raise
                pytest.skip(str(error))

    @contextmanager
    def _settings(self) -> Iterator[None]:
        if self.backend in FORWARD_ONLY:
            select = ops.select

            def forward_only(*call: Any, backward: bool = False, **rest: Any) -> backends.Backend:
                *call, backend = call
                return select(*call, "eager" if backward else backend, backward=backward, **rest)

            with mock.patch.object(ops, "select", forward_only):
                yield
        elif self.isa is not None:
            native = backends.load("cpu").native
            before = native.cpu_isa()
            native.set_cpu_isa(self.isa)
            try:
                yield
            finally:
                native.set_cpu_isa(before)
        else:
            yield

    def refusals(self, case: Case) -> list[str]:
        """The backend's reasons for refusing such a call."""
        score = "concat" if case.score == "projected" else case.score
        score_dim = case.attn_dim if score == "concat" else case.memory_dim
        sizes = (case.batch, case.queries, case.source, case.memory_dim, score_dim)
        flags = {"return_weights": case.weights, "windowed": case.window != "none"}
        problem = AttentionProblem(score, *sizes, case.dtype, self.device, **flags)
        return backends.load(self.backend).not_supported_reasons(problem)

    @property
    def is_interpreted(self) -> bool:
        """Whether the kernels run in Triton's interpreter."""
        return self.backend == "triton" and self.device == "cpu"

    def needs_speed(self) -> None:
        """Skip a test that only adds sizes if kernels are interpreted, which is slow."""
        if self.is_interpreted:
            pytest.skip("without a GPU the Triton kernels are interpreted, with fewer sizes")

    def inputs(self, case: Case, seed: int = 0) -> Inputs:
        if self.is_interpreted:  # smaller sizes that take the same code paths, and are still odd
            case = replace(
                case,
                queries=min(case.queries, 20),
                source=min(case.source, 170),
                memory_dim=min(case.memory_dim, 70),
                attn_dim=min(case.attn_dim, 37),
            )
        return testing.make_inputs(case, seed, self.device)

    def run(self, inputs: Inputs) -> Tensors:
        """Results and gradients; unwritten outputs are NaN."""
        with self.active():
            return self._results(inputs)

    def _results(self, inputs: Inputs) -> Tensors:
        with testing.poisoned_empty():
            return testing.fused(inputs, self.backend)

    def check(self, case: Case, seed: int = 0) -> None:
        """Compare the call with the oracle, or its refusal with the backend's reasons."""
        inputs = self.inputs(case, seed)
        if reasons := self.refusals(case):
            refused = pytest.raises(ValueError, match="no backend can do")
            with self._settings(), refused as error:
                self._results(inputs)
            assert all(reason in str(error.value) for reason in reasons)
            return
        got = self.run(inputs)
        # With one position, all weights are 1 for any scores.
        scales = cancelled_sizes(inputs) if case.source == 1 else None
        testing.check_results(got, testing.oracle(inputs), testing.plain(inputs), scales)


def cancelled_sizes(inputs: Inputs) -> dict[str, float]:
    """By name, the size of the terms that are summed to a gradient through the softmax.

    If one weight is 1, or all are equal for any scores, these gradients are differences of equal
    numbers. Only rounding remains, which is small compared to the terms, not to the result.
    """
    memory, grad_weights = inputs.tensors["memory"].double(), inputs.grad_weights
    weight_grads = inputs.grad_context.double() @ memory.mT
    if grad_weights is not None:
        weight_grads = weight_grads + grad_weights
    largest = {name: float(t.abs().max()) for name, t in inputs.tensors.items()}
    projections = ("query_proj", "memory_proj")  # their values multiply no gradient
    factor = max([1.0, *(size for name, size in largest.items() if name not in projections)])
    through = set(largest) - ({"memory"} if inputs.score == "projected" else set())
    return {f"grad_{name}": factor * float(weight_grads.abs().max()) for name in through}


def _targets(name: str) -> Iterator[object]:
    backend, reasons = backends.load(name), []
    for device in DEVICES:
        problem = AttentionProblem("dot", 1, 1, 1, 1, 1, torch.float32, device)
        if refused := backend.not_supported_reasons(problem):
            reasons += refused
            continue
        isas = backend.native.attention_isas_supported() if name == "cpu" else (None,)
        yield from (Target(name, device, isa) for isa in isas)
    if len(reasons) >= len(DEVICES):
        skip = pytest.mark.skip(reason=f"{name}: {'; '.join(reasons)}")
        yield pytest.param(None, marks=skip, id=name)


TARGETS = tuple(target for name in backends.BACKENDS for target in _targets(name))
every_target = pytest.mark.parametrize("target", TARGETS, ids=str)
