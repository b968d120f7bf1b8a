"""What `python -m benchmarks cpu` times and judges, and the yardsticks of the machine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks_package import imported

from fused_attn import backends, functional, testing

pytestmark = pytest.mark.skipif(
    bool(backends.unavailable_reasons("cpu")), reason="the cpu backend is not usable here"
)
KINDS = ["dot, step", "dot, fwd+bwd", "general, tiny", "concat, projections, fwd+bwd"]
KINDS += ["concat score, prepared, avx2", "concat, step, prepared"]


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    with imported() as loaded:
        yield loaded


def row_of(bench: SimpleNamespace, case: str, sizes: tuple[int, ...] = (4, 6, 5, 16)) -> Any:
    row = next(row for row in bench.targets.cpu.rows.ROWS if row.case == case)
    return replace(row, sizes=bench.common.problems.Sizes(*sizes))


@pytest.mark.parametrize("case", KINDS)
def test_both_sides_compute_what_the_oracle_does(bench: SimpleNamespace, case: str) -> None:
    row = replace(row_of(bench, case), dtype=torch.float64)
    inputs = bench.common.calls.inputs_of(row)
    assert inputs.masking.memory_lengths.tolist() == [5] * 4 and inputs.scale == 1.0
    right = testing.oracle(inputs)
    for side in (bench.common.sides.fused, bench.common.sides.eager):
        found = bench.common.judging.results(row, inputs, side(row, inputs))
        assert set(found) == (set(right) if row.backward else {"context"})
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, right[name], msg=name)


@pytest.mark.parametrize("case", KINDS)
def test_what_is_timed_is_what_is_judged(bench: SimpleNamespace, case: str) -> None:
    row = row_of(bench, case)
    inputs = bench.common.calls.inputs_of(row)
    attend = bench.common.sides.fused(row, inputs)
    judged = bench.common.judging.results(row, inputs, attend)
    with torch.set_grad_enabled(row.backward):
        timed = bench.common.calls.call_of(row, inputs, attend)()
    names = [f"grad_{name}" for name in inputs.tensors] if row.backward else ["context"]
    for name, tensor in zip(names, timed if row.backward else timed[:1], strict=True):
        assert torch.equal(tensor, judged[name]), name


def test_no_gradient_is_kept_for_a_forward(bench: SimpleNamespace) -> None:
    row = row_of(bench, "dot, step")
    inputs = bench.common.calls.inputs_of(row)
    assert not any(tensor.requires_grad for tensor in inputs.tensors.values())


def test_prepared_rows_pass_the_exponentials(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, passed = functional.attend_concat, []

    def spy(*arguments: Any) -> Any:
        passed.append(arguments[2])
        return right(*arguments)

    monkeypatch.setattr(functional, "attend_concat", spy)
    prepared = row_of(bench, "concat, step, prepared")
    for row in (replace(prepared, prepared=False), prepared):
        inputs = bench.common.calls.inputs_of(row)
        bench.common.judging.results(row, inputs, bench.common.sides.fused(row, inputs))
    first, second = passed
    assert first is None
    torch.testing.assert_close(second, torch.exp(2 * inputs.tensors["memory_proj"]))


def test_a_bandwidth_row_reads_as_much_as_no_cache_holds(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = row_of(bench, "dot, step")
    monkeypatch.setattr(bench.common.machine, "READ_BYTES", 3 * row.read_bytes)
    right, read = functional.dot_attention, []

    def spy(query: torch.Tensor, memory: torch.Tensor, **rest: Any) -> Any:
        read.append(memory.data_ptr())
        return right(query, memory, **rest)

    monkeypatch.setattr(functional, "dot_attention", spy)
    inputs = bench.common.calls.inputs_of(row)
    timed, fused = bench.common.scaling.timed, bench.common.sides.fused
    (call,) = timed(row, inputs, fused, read_bytes=bench.common.machine.READ_BYTES)
    contexts = [call()[0] for _ in range(8)]
    assert read[:4] == read[4:] and len(set(read)) == 4
    assert all(torch.equal(context, contexts[0]) for context in contexts)


@pytest.fixture
def small_oracle(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for 2 rows of the batch and 2 of the 6 queries."""
    monkeypatch.setattr(bench.common.judging, "JUDGED_ELEMENTS", 2 * 2 * 5 * 16)


def test_a_large_concat_is_judged_in_part(bench: SimpleNamespace, small_oracle: None) -> None:
    row = row_of(bench, "concat, projections, fwd+bwd")
    part = bench.common.judging.Part.of(row).inputs(bench.common.calls.inputs_of(row))
    assert part.tensors["query"].shape == (2, 2, 16)
    assert part.tensors["memory"].shape == (2, 5, 16)
    assert part.tensors["query_weight"].shape == (16, 16)
    assert part.grad_context.shape == (2, 2, 16) and part.masking.memory_lengths.shape == (2,)
    dot = row_of(bench, "dot, fwd+bwd")
    whole = bench.common.judging.Part.of(dot).inputs(bench.common.calls.inputs_of(dot))
    assert whole.tensors["query"].shape == (4, 6, 16)


@pytest.mark.parametrize("sizes", [(4, 6, 5, 16), (3, 7, 5, 16), (1, 6, 5, 16), (5, 1, 200, 16)])
def test_a_part_fits_the_oracle_and_is_not_empty(
    bench: SimpleNamespace, sizes: tuple[int, ...], small_oracle: None
) -> None:
    row = row_of(bench, "concat, projections, fwd+bwd", sizes)
    part = bench.common.judging.Part.of(row).inputs(bench.common.calls.inputs_of(row))
    rows, queries, _ = part.tensors["query"].shape
    assert 1 <= rows <= 2 and 1 <= queries
    assert queries == 1 or rows * queries * sizes[2] * sizes[3] <= 2 * 2 * 5 * 16


def test_a_part_is_judged_with_every_gradient(bench: SimpleNamespace, small_oracle: None) -> None:
    row = row_of(bench, "concat, projections, fwd+bwd")
    inputs = bench.common.calls.inputs_of(row)
    verdicts = bench.common.judging.judge_fused(row, inputs)
    assert verdicts.keys() == {"context", *(f"grad_{name}" for name in inputs.tensors)}
    assert all(verdict.passed and verdict.largest > 0 for verdict in verdicts.values())


@pytest.mark.parametrize("wrong", ["context", "grad_query", "grad_memory", "grad_v"])
def test_a_wrong_part_is_found(
    bench: SimpleNamespace, wrong: str, small_oracle: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a gradient, also one that arises where no gradient came back."""
    row = row_of(bench, "concat, projections, fwd+bwd")
    right = bench.common.judging.results

    def broken(row: Any, inputs: Any, attend: Any) -> Any:
        found = right(row, inputs, attend)
        if len(found["context"]) == 4:  # the fused side, which is run whole
            place = 1 if wrong in ("grad_query", "grad_memory") else 0  # not a judged row
            found[wrong][place] += 0.01 * found[wrong].abs().max()
        return found

    monkeypatch.setattr(bench.common.judging, "results", broken)
    verdicts = bench.common.judging.judge_fused(row, bench.common.calls.inputs_of(row))
    assert [name for name, verdict in verdicts.items() if not verdict.passed] == [wrong]


def test_multiply_adds_says_how_many_it_did() -> None:
    native = backends.load("cpu").native
    before = native.cpu_isa()
    done = {}
    try:
        for isa in native.attention_isas_supported():
            native.set_cpu_isa(isa)
            once = native.multiply_adds(1, 1)
            assert native.multiply_adds(7, 1) == native.multiply_adds(7, 3) == 7 * once
            done[isa] = once
    finally:
        native.set_cpu_isa(before)
    assert native.multiply_adds(0, 2) == 0
    lanes = {"avx512": 16, "avx512_bf16": 16, "avx2": 8, "generic": 4}
    assert len({once / lanes[isa] for isa, once in done.items()}) == 1


def test_peak_counts_the_operations_of_its_call(bench: SimpleNamespace) -> None:
    for threads in (1, 2):
        call, operations = bench.common.machine.peak_call(threads)
        assert call() == operations > 0


def test_read_call_reads_all_of_it(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.common.machine, "READ_BYTES", 1 << 16)
    bench.common.machine._large.cache_clear()
    assert float(bench.common.machine.read_call()()) == (1 << 16) / 4
    bench.common.machine._large.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_the_process_grows_with_what_it_holds(bench: SimpleNamespace) -> None:
    before = bench.common.peak_memory.memory_of_process("VmRSS")
    held = torch.ones(16 << 20)
    grown = bench.common.peak_memory.memory_of_process("VmRSS") - before
    assert 60 << 20 < grown < 120 << 20 and len(held)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_grows_with_the_problem(bench: SimpleNamespace) -> None:
    def grown(*sizes: int) -> int:
        command = [sys.executable, bench.common.peak_memory.__file__, *map(str, (*sizes, 1))]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    # The gradient of the memory alone is 64 MiB in the larger one; all pairs by width, 1 GiB.
    small, large = grown(1, 2, 8, 16), grown(1, 16, 32768, 512)
    assert small + (64 << 20) < large < 1 << 30
