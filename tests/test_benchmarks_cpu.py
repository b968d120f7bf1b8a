"""`python -m benchmarks cpu`: every kind of row at small sizes, its verdicts, options and files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks_package import imported

from fused_attn import backends, functional, testing

pytestmark = pytest.mark.skipif(
    bool(backends.unavailable_reasons("cpu")), reason="the cpu backend is not usable here"
)
WRONG = {
    "value": lambda context: context * 1.001,
    "nan": lambda context: context * torch.nan,
    "gradient": lambda context: context.detach() + 0.999 * (context - context.detach()),
}


@pytest.fixture(scope="module")
def modules() -> Iterator[SimpleNamespace]:
    with imported() as loaded:
        yield loaded


@pytest.fixture
def bench(modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The modules, with a machine that is small and quickly read."""
    monkeypatch.setattr(modules.common.machine, "READ_BYTES", 1 << 16)
    monkeypatch.setattr(modules.common.machine, "PEAK_ROUNDS", 1)
    modules.common.machine._large.cache_clear()
    yield modules
    modules.common.machine._large.cache_clear()


def tiny(bench: SimpleNamespace, row: Any) -> Any:
    sizes = bench.common.problems.Sizes(2, min(row.sizes.queries, 3), 5, 16)
    return replace(row, sizes=sizes)


def tiny_rows(bench: SimpleNamespace) -> list[Any]:
    """One row of every case, except those for instruction sets that are not here."""
    rows = {row.case: tiny(bench, row) for row in bench.targets.cpu.rows.ROWS}
    supported = backends.load("cpu").native.cpu_isas_supported()
    return [row for row in rows.values() if row.isa is None or row.isa in supported]


def row_of(bench: SimpleNamespace, case: str) -> Any:
    return next(tiny(bench, row) for row in bench.targets.cpu.rows.ROWS if row.case == case)


def tiny_plan(bench: SimpleNamespace) -> Any:
    row = row_of(bench, "dot")
    return bench.targets.cpu.command.Plan(tiny_rows(bench), [row], [(row, "S")])


def run(bench: SimpleNamespace, plan: Any, *arguments: str) -> int:
    return bench.targets.cpu.command.main(["--seconds", "0", *arguments], plan)


def cells_of(text: str, label: str) -> list[list[str]]:
    """The cells of the lines that begin with ``label`` and hold a table's row."""
    lines = [line for line in text.splitlines() if line.startswith(f"{label}  ")]
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]


def test_every_kind_of_row_is_measured(
    bench: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    assert run(bench, tiny_plan(bench)) == 0
    text = capsys.readouterr().out
    native = backends.load("cpu").native
    assert f"{native.cpu_isa()}, threads: {threads}, torch {torch.__version__}" in text
    for row in tiny_rows(bench):
        ((_, sizes, *cells, verdict),) = cells_of(text, row.case)
        assert sizes == str(row.sizes) and verdict in ("ok", "SHORT")
        wanted = [] if row.speedup is None else [f">= {row.speedup:g}x"]
        wanted += [] if row.second is None else [str(row.second)]
        figures = [cells[cells.index(target) - 1] for target in wanted]
        assert len(figures) >= 1 and all(figure[0].isdigit() for figure in figures)
        assert (verdict == "SHORT") == any(figure.endswith("!") for figure in figures)
        assert (f"  {row.label}: " in text) == (verdict == "SHORT")
    assert "withheld" not in text and "Not measured here" not in text
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_result_has_no_speed(
    bench: SimpleNamespace,
    wrong: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = functional.dot_attention

    def broken(query: torch.Tensor, memory: torch.Tensor, **rest: Any) -> Any:
        context, weights = right(query, memory, **rest)
        return WRONG[wrong](context), weights

    monkeypatch.setattr(functional, "dot_attention", broken)
    rows = [row_of(bench, "dot, fwd+bwd"), row_of(bench, "general, tiny")]
    assert run(bench, bench.targets.cpu.command.Plan(rows, [], [])) == 1
    text = capsys.readouterr().out
    assert cells_of(text, "dot, fwd+bwd") == [
        ["dot, fwd+bwd", "(2, 3, 5, 16)", ">= 1.6x", "withheld"]
    ]
    assert cells_of(text, "general, tiny")[0][-1] in ("ok", "SHORT")
    assert "WITHHELD" in text and f"  {rows[0].label}: error of " in text
    assert f"  {rows[1].label}: error of " not in text


def test_scaling_of_a_wrong_result_is_withheld(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = functional.dot_attention
    monkeypatch.setattr(
        functional,
        "dot_attention",
        lambda *tensors, **rest: (right(*tensors, **rest)[0] * 1.001, None),
    )
    row = row_of(bench, "dot")
    assert run(bench, bench.targets.cpu.command.Plan([], [row], [(row, "T")])) == 1
    text = capsys.readouterr().out
    assert cells_of(text, row.label) == [[row.label, "withheld"]]
    assert cells_of(text, f"{row.label}, T") == [[f"{row.label}, T", "withheld"]]
    assert f"  threads {row.label}" in text and f"  growth {row.label}, T" in text


def test_a_wrong_float32_side_is_withheld_too(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bfloat16 row is held against our own float32 time, which must be that of a right result."""
    right = functional.dot_attention

    def broken(query: torch.Tensor, memory: torch.Tensor, **rest: Any) -> Any:
        context, weights = right(query, memory, **rest)
        return context * (1.001 if context.dtype == torch.float32 else 1.0), weights

    row = row_of(bench, "dot, bf16")
    assert bench.targets.cpu.figures.measure(row, 1, 0.0).passed
    monkeypatch.setattr(functional, "dot_attention", broken)
    result = bench.targets.cpu.figures.measure(row, 1, 0.0)
    wrong = [name for name, verdict in result.verdicts.items() if not verdict.passed]
    assert wrong == ["fp32 context"] and result.verdict == "withheld" and not result.seconds


@pytest.mark.parametrize(
    ("value", "most", "met"),
    [(2.0, False, True), (1.99, False, False), (1.99, True, True), (2.0, True, False)],
)
def test_a_figure_meets_its_target(
    bench: SimpleNamespace, value: float, most: bool, met: bool
) -> None:
    figure = bench.targets.cpu.figures.Figure(value, 2.0, "", "", most)
    assert figure.met == met


def test_verdict_names_each_figure_that_falls_short(bench: SimpleNamespace) -> None:
    figure, row = bench.targets.cpu.figures.Figure, row_of(bench, "dot")
    good, bad = figure(3.0, 2.0, "3x", ">= 2x"), figure(0.4, 0.5, "40%", ">= 50%")
    result = bench.targets.cpu.figures.Result(
        row, seconds={"fused": 1e-3}, speedup=good, second=bad
    )
    assert result.verdict == "SHORT" and result.short == [bad]
    assert bench.targets.cpu.command.table_row(result)[2:] == [
        "1 ms", "", "3x", ">= 1.8x", "40%!", ">= 50% of peak", "SHORT",
    ]  # fmt: skip
    report = bench.targets.cpu.command.Report({}, [result])
    assert bench.targets.cpu.command.endings(report)[1:] == [
        "SHORT of the target (!)",
        f"  {row.label}: 40%, target >= 50%",
    ]
    assert replace(result, second=good).verdict == "ok"
    assert replace(result, unable="no such thing").verdict == "not here"
    failed = testing.Verdict(1.0, 0.0, 0.5, 1.0)
    assert replace(result, verdicts={"context": failed}).verdict == "withheld"


def test_second_figures(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worked by hand from made-up times."""
    sizes = bench.common.problems.Sizes(2, 10, 50, 100)
    second = bench.targets.cpu.figures._second

    def figure(case: str, kind: str, seconds: dict[str, float], **rest: int) -> tuple[float, str]:
        row = replace(row_of(bench, case), sizes=sizes, memory_dim=None)
        return second(row, kind, seconds, rest.get("threads", 1), rest.get("operations", 0))

    monkeypatch.setattr(bench.common.machine, "READ_BYTES", 10**6)
    # 2 x 50 x 100 floats of 4 bytes in 1 us, against a megabyte in 20 us.
    read = {"fused": 1e-6, "read": 20e-6}
    value, text = figure("dot, step", "read", read)
    assert (value, text) == (pytest.approx(0.8), "40.0 GB/s = 80.0% of 50.0")
    assert figure("dot, step, bf16", "read", read)[1] == "20.0 GB/s = 40.0% of 50.0"
    assert figure("concat, step, prepared", "read", read)[1] == "80.0 GB/s = 160.0% of 50.0"
    # 4 x 2 x 10 x 50 x 100 operations.
    peak = {"fused": 4e-6, "peak": 1e-6}
    value, text = figure("dot", "peak", peak, operations=200_000)
    assert (value, text) == (pytest.approx(0.5), "100.0 GFLOP/s = 50.0% of 200.0")
    # 2 x 10 x 50 x 100 products by two threads.
    value, text = figure("concat score, prepared, avx2", "elements", {"fused": 5e-6}, threads=2)
    assert (value, text) == (pytest.approx(10.0), "10.0 Gelem/s a core")
    value, text = figure("dot, bf16", "fp32", {"fused": 2.0, "fp32": 3.0})
    assert (value, text) == (1.5, "1.50x fp32")


def test_rows_for_other_instruction_sets_say_so(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    native = backends.load("cpu").native
    monkeypatch.setattr(native, "cpu_isas_supported", lambda: ["generic"])
    row = row_of(bench, "concat score, prepared, avx512")
    assert run(bench, bench.targets.cpu.command.Plan([row], [], [])) == 0
    text = capsys.readouterr().out
    assert cells_of(text, row.case)[0][-1] == "not here"
    assert f"  {row.label}: this machine has no avx512" in text


def test_a_row_runs_on_its_instruction_set(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    native, right = backends.load("cpu").native, functional.attend_concat
    used = []

    def spy(*arguments: Any) -> Any:
        used.append(native.cpu_isa())
        return right(*arguments)

    monkeypatch.setattr(functional, "attend_concat", spy)
    before, other = native.cpu_isa(), native.cpu_isas_supported()[-1]
    row = replace(row_of(bench, "concat score, prepared, avx2"), isa=other)
    assert bench.targets.cpu.figures.measure(row, 1, 0.0).verdict in ("ok", "SHORT")
    assert set(used) == {other} and native.cpu_isa() == before
    with pytest.raises(KeyError), bench.common.machine.using_isa(other):
        raise KeyError
    assert native.cpu_isa() == before


def test_rows_are_chosen_by_their_labels(
    bench: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(bench, tiny_plan(bench), "--rows", "TINY") == 0
    text = capsys.readouterr().out
    assert [row.case for row in tiny_rows(bench) if cells_of(text, row.case)] == [
        "dot, tiny",
        "general, tiny",
        "concat, tiny, prepared",
    ]
    assert "speedup" not in text and "growth" not in text
    assert run(bench, tiny_plan(bench), "--rows", "growth") == 0
    text = capsys.readouterr().out
    assert "growth" in text and "verdict" not in text and "speedup" not in text


@pytest.mark.threads(1)
def test_threads_of_the_run_and_of_a_row(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right, used = functional.dot_attention, []

    def spy(*tensors: torch.Tensor, **rest: Any) -> Any:
        used.append((tensors[0].shape[1], torch.get_num_threads()))
        return right(*tensors, **rest)

    monkeypatch.setattr(functional, "dot_attention", spy)
    path = tmp_path / "figures.json"
    plan = bench.targets.cpu.command.Plan(
        [row_of(bench, "dot"), row_of(bench, "dot, tiny")], [], []
    )
    assert run(bench, plan, "--threads", "2", "--json", str(path)) == 0
    assert set(used) == {(3, 2), (1, 1)}  # T tells the rows apart
    assert torch.get_num_threads() == 1
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["provenance"]["threads"] == 2
    assert [row["threads"] for row in written["rows"]] == [2, 1]


def test_figures_are_written_as_printed(
    bench: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figures.json"
    path.write_text("old", encoding="utf-8")
    plan = replace(tiny_plan(bench), rows=[row_of(bench, "dot"), row_of(bench, "dot, step")])
    assert run(bench, plan, "--json", str(path)) == 0
    text = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [path]
    written = json.loads(path.read_text(encoding="utf-8"))
    facts = written["provenance"]
    assert facts["processor"] in text and facts["date"][:10] in text
    assert facts["versions"]["torch"] == torch.__version__
    for row in written["rows"]:
        ((_, _, *cells),) = cells_of(text, row["case"])
        assert cells[-1] == row["verdict"]
        for name in ("speedup", "second"):
            figure = row[name]
            assert figure["met"] == (figure["value"] >= figure["target"])
            assert figure["text"] + ("" if figure["met"] else "!") in cells
            assert figure["wanted"] in cells
        assert row["speedup"]["value"] == row["seconds"]["eager"] / row["seconds"]["fused"]
        assert 0 <= row["errors"]["context"]["error"] <= row["errors"]["context"]["budget"]
    (threads,), (growth,) = written["threads"], written["growth"]
    assert threads["passed"] and next(iter(threads["seconds"])) == "1"
    assert growth["passed"] and [*growth["seconds"]] == ["0", "1", "2", "3"]


@pytest.mark.threads(1)
@pytest.mark.parametrize(("cores", "counts"), [(1, [1]), (2, [1, 2]), (64, [1, 2])])
def test_threads_up_to_the_cores(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, cores: int, counts: list[int]
) -> None:
    right, used = functional.dot_attention, []

    def spy(*tensors: torch.Tensor, **rest: Any) -> Any:
        used.append(torch.get_num_threads())
        return right(*tensors, **rest)

    monkeypatch.setattr(functional, "dot_attention", spy)
    monkeypatch.setattr(bench.common.machine, "cores", lambda: cores)
    scaled = bench.common.scaling.measure_threads("dot", row_of(bench, "dot"), 0.0)
    assert scaled.passed and list(scaled.seconds) == counts and set(used) == set(counts)
    assert torch.get_num_threads() == 1
    table = bench.targets.cpu.scaling.threads_table([scaled])
    assert table.rstrip().endswith("x") == (len(counts) == 2)


def test_ratios_of_the_scaling_tables(bench: SimpleNamespace) -> None:
    scaled = bench.common.scaling.Scaled
    growth = bench.targets.cpu.scaling.growth_table(
        [scaled("dot, S", True, {0: 1e-3, 1: 2e-3, 2: 5e-3, 3: 5e-3})]
    )
    assert growth.splitlines()[-1].split() == ["dot,", "S", "1", "ms", "2.00x", "2.50x", "1.00x"]
    threads = bench.targets.cpu.scaling.threads_table([scaled("dot", True, {1: 3e-3, 2: 2e-3})])
    assert threads.splitlines()[-1].split() == ["dot", "3", "ms", "2", "ms", "1.50x"]


@pytest.mark.parametrize("axis", ["S", "T", "B"])
def test_growth_doubles_one_size(
    bench: SimpleNamespace, axis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, seen = functional.dot_attention, []

    def spy(query: torch.Tensor, memory: torch.Tensor, **rest: Any) -> Any:
        seen.append((memory.shape[1], query.shape[1], query.shape[0]))
        return right(query, memory, **rest)

    monkeypatch.setattr(functional, "dot_attention", spy)
    bench.common.scaling.measure_growth("dot", row_of(bench, "dot"), axis, 1, 0.0)
    base, place = (5, 3, 2), "STB".index(axis)
    expected = {(*base[:place], base[place] << n, *base[place + 1 :]) for n in range(4)}
    assert set(seen) == expected


def test_rows_know_their_targets(bench: SimpleNamespace) -> None:
    rows = bench.targets.cpu.rows.ROWS
    assert len({row.label for row in rows}) == len(rows)
    assert all(row.speedup is not None or row.second is not None for row in rows)
    assert all(str(row.second) for row in rows if row.second is not None)
    assert all(row.score in testing.SCORES for row in rows)
