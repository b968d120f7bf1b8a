"""`python -m benchmarks decoder`: the least time of the machine, worked by hand."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from benchmarks_package import imported

COMPUTES = ("float32", "bfloat16", "int8")


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The modules of the benchmark."""
    with imported() as loaded:
        yield loaded.targets.decoder


def test_work_of_a_step(bench: SimpleNamespace) -> None:
    """The figures of the design: 7.5 million multiply-adds, 30, 15 and 7.5 MB."""
    sizes = bench.rows.Sizes()
    general = 4 * 512 * 1024 + 512 * 1024 + 512 * 1536 + 8000 * 512
    assert bench.problem.weights_of_step(sizes, "general") == general
    concat = 4 * 512 * 1536 + 512 * 512 + 512 * 1536
    assert bench.problem.weights_of_step(sizes, "concat") == concat
    works = [bench.floors.work_of_step(general, 32, compute) for compute in COMPUTES]
    assert [work.read_bytes for work in works] == [4 * general, 2 * general, general]
    assert {work.operations for work in works} == {32 * general}


def test_floors(bench: SimpleNamespace) -> None:
    """The larger of reads and multiply-adds, worked by hand."""
    floors = bench.floors
    factors = {"float32": 1, "bfloat16": 2, "int8": 4}
    # A million weights, 10 GB/s, 50 G multiply-adds a second.
    expected = {1: (400e-6, 200e-6, 100e-6), 64: (1280e-6, 640e-6, 320e-6)}
    for rows, seconds in expected.items():
        for compute, value in zip(COMPUTES, seconds, strict=True):
            work = floors.work_of_step(10**6, rows, compute)
            floor = floors.floor_of(work, 10e9, 50e9, factors)
            assert floor.seconds == pytest.approx(value)
    assert floor.multiplying == pytest.approx(320e-6) and floor.reading == pytest.approx(100e-6)


def test_the_fastest_read_counts(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.floors, "peak_factors", lambda: {"float32": 1, "int8": 4})
    work = bench.floors.work_of_step(10**6, 1, "int8")
    seconds = {"sum": 50e-6, "product": 20e-6, "square": 30e-6, "peak": 1e-3}
    floor = bench.floors.floor_from(seconds, work, 10**8)
    assert floor.bandwidth == pytest.approx(50e9) and floor.reading == pytest.approx(20e-6)
    assert floor.peak == pytest.approx(4e11) and floor.multiplying == pytest.approx(2.5e-6)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("avx2 fma", (1, 1, 1)),
        ("avx2 avx_vnni", (1, 1, 4)),
        ("avx512f avx512_vnni", (1, 1, 4)),
        ("avx512f avx512_vnni avx512_bf16", (1, 2, 4)),
    ],
)
def test_peaks_of_the_types(bench: SimpleNamespace, flags: str, expected: tuple[int, ...]) -> None:
    factors = bench.floors.peak_factors(frozenset(flags.split()))
    assert factors == dict(zip(COMPUTES, expected, strict=True))


def test_yardsticks_read_and_multiply(bench: SimpleNamespace) -> None:
    calls, operations = bench.floors.limit_calls(1 << 20, 1)
    assert set(calls) == {"sum", "product", "square", "peak"} and operations > 0
    assert float(calls["sum"]()) == (1 << 20) / 4  # every float of the buffer is a one
    assert float(calls["product"]().sum()) == float(calls["square"]()) == (1 << 20) / 4


def test_work_of_a_word(bench: SimpleNamespace) -> None:
    """Of a small model, counted by hand."""
    from fused_attn.seq2seq.config import ModelConfig
    from fused_attn.seq2seq.model.seq2seq import Seq2Seq

    model = Seq2Seq(ModelConfig(hidden=3, embedding=2, score="general"), 10, 7)
    once, each = 2 * 12 * 2, 2 * 12 * 3  # two directions of four gates
    bridge = 2 * 3 * 6
    step = 12 * 2 + 12 * 3 + 6 * 3 + 3 * (6 + 3) + 7 * 3
    works = bench.words.work_of_word(model, 5, 4, "int8")
    found = {name: (work.held, work.reads, work.operations) for name, work in works.items()}
    assert found == {
        "inputs and bridge": (once + bridge, once + bridge, 5 * once + bridge),
        "recurrence": (12 * 3, 5 * each, 5 * each),
        "decoder": (step, 5 * step, 5 * step),
    }


def test_floors_of_parts_add_up(bench: SimpleNamespace) -> None:
    works = [bench.floors.Work(9, 8000, 100, "int8"), bench.floors.Work(9, 1000, 3000, "float32")]
    factors = {"int8": 4, "float32": 1}
    parts = [bench.floors.floor_of(works[0], 4000.0, 100.0, factors),
             bench.floors.floor_of(works[1], 8000.0, 1000.0, factors)]  # fmt: skip
    # 2 s of reads beside 0.25 s of multiply-adds, then 0.5 s beside 3 s.
    assert [part.seconds for part in parts] == pytest.approx([2.0, 3.0])
    whole = bench.floors.one_after_another(works, parts)
    assert (whole.reading, whole.multiplying, whole.seconds) == pytest.approx((2.5, 3.25, 5.0))
    assert whole.bandwidth == pytest.approx(12000 / 2.5)
    assert whole.peak == pytest.approx(3100 / 3.25)
