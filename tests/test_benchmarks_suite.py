"""The suite: who is compared and how, what is withheld, what is written, what counts as worse."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks_package import LOCATION, ROOT, imported

from fused_attn import functional
from fused_attn.seq2seq.config import ModelConfig, SearchConfig


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    with imported() as modules:
        yield modules


def tiny_cases(bench: SimpleNamespace) -> list[Any]:
    """One of each kind, so small that each takes no time."""
    sizes = bench.common.problems.Sizes
    make = bench.suite.cases._case
    return [
        *make("a step", "here", sizes(3, 1, 7, 16), "dot general projected", quick="dot"),
        *make("training", "here", sizes(2, 3, 5, 16), "dot general concat", both=True),
    ]


def quick_sides(bench: SimpleNamespace) -> list[Any]:
    return [side for side in bench.suite.sides.sides("cpu") if not side.slow]


@pytest.fixture
def small(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The suite with tiny cases, a layer and a model of each kind."""
    every = tiny_cases(bench)
    monkeypatch.setattr(bench.suite.cases, "OPERATORS", tuple(every))
    monkeypatch.setattr(bench.common.machine, "READ_BYTES", 1 << 16)
    monkeypatch.setattr(bench.common.machine, "PEAK_ROUNDS", 1)
    models = bench.suite.models
    layers = [models.LayerCase("layer", "here", s, (2, 3, 5, 16), True) for s in ("dot", "concat")]
    monkeypatch.setattr(models, "LAYERS", layers)
    config = ModelConfig(hidden=16, embedding=8, dropout=0.0, score="concat")
    monkeypatch.setattr(
        models,
        "MODELS",
        [
            models.ModelCase(f"model, {work}", "here", work, config, 3, 5, 4, 30, True, search)
            for work, search in (
                ("training", SearchConfig()),
                ("greedy", SearchConfig()),
                ("beam 5", SearchConfig(beam=5)),
            )
        ],
    )
    return bench


def measure(bench: SimpleNamespace, case: Any) -> dict[str, Any]:
    limits = bench.suite.measure.Limits(1e9, 1e9)
    records = bench.suite.measure.measure_case(case, quick_sides(bench), "cpu", limits, 0.01)
    return {record.side: record for record in records}


def test_every_side_that_can_is_right_and_has_a_time(bench: SimpleNamespace) -> None:
    for case in tiny_cases(bench):
        found = measure(bench, case)
        product = case.row.score in ("dot", "general")
        able = {"fused (cpu)", "eager", "as Keras", "as OpenNMT"}
        able |= {"SDPA"} if product else set()
        able |= {"in chunks"} if case.row.score == "concat" else set()
        assert {name for name, record in found.items() if record.seconds} == able, case.id
        for name, record in found.items():
            if name in able:
                assert not record.wrong and record.seconds.median > 0
                assert record.errors["context"] < 1e-5
                gradients = {key for key in record.errors if key.startswith("grad_")}
                assert bool(gradients) == case.row.backward
                assert (record.read_share is None) == case.row.backward
            else:
                assert record.unable and not record.errors


@pytest.mark.parametrize("is_wrong", [False, True])
def test_native_decoding_is_a_side_that_is_judged(
    small: SimpleNamespace, is_wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = small.suite.models
    if is_wrong:
        right = models.PackedModels.search

        def wrong(*arguments: Any, **options: Any) -> Any:
            first, *rest = right(*arguments, **options)
            return [[replace(best, tokens=[best.tokens[0] + 1]) for best in first], *rest]

        monkeypatch.setattr(models.PackedModels, "search", wrong)
    for case in models.MODELS:
        if case.work == "training":
            continue
        found = {record.side: record for record in models.measure_model(case, "cpu", "cpu", 0.01)}
        assert set(found) == {"fused", "eager", "native"}
        assert found["fused"].seconds and found["eager"].seconds
        assert found["native"].ours and found["native"].withheld == is_wrong
        assert (found["native"].seconds is None) == is_wrong


@pytest.mark.parametrize("wrong", ["value", "gradient", "nan"])
def test_a_wrong_kernel_has_no_speed(
    bench: SimpleNamespace, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = functional.dot_attention

    def broken(query: torch.Tensor, memory: torch.Tensor, **rest: Any) -> Any:
        context, weights = right(query, memory, **rest)
        if wrong == "gradient":
            return context.detach() + 0.999 * (context - context.detach()), weights
        return context * (1.001 if wrong == "value" else torch.nan), weights

    monkeypatch.setattr(functional, "dot_attention", broken)
    (case,) = (c for c in tiny_cases(bench) if c.row.score == "dot" and c.row.backward)
    found = measure(bench, case)
    ours = found["fused (cpu)"]
    assert ours.seconds is None and ours.withheld
    assert ("context" in ours.wrong) == (wrong != "gradient")
    assert found["eager"].seconds is not None
    run = bench.suite.results.Run(
        bench.suite.results.provenance(1, "cpu"), bench.suite.measure.Limits(1e9, 1e9),
        list(found.values()),
    )  # fmt: skip
    text = bench.suite.results.text_of(run)
    (row,) = (line for line in text.splitlines() if line.startswith("training"))
    assert "withheld" in row and not re.search(r"\d x|\d\.\d\dx", row)
    assert "WITHHELD: fused (cpu), training/dot" in text
    page = bench.suite.report.page(run)
    assert "<span class=wrong>withheld</span>" in page and "(1 withheld)" in page
    assert "training" not in bench.suite.report.readme_table(run)


def test_a_side_that_fails_says_so(bench: SimpleNamespace) -> None:
    def fails(row: object, inputs: object) -> Any:
        def attend(tensors: object) -> None:
            raise RuntimeError("no such kernel\nand more")

        return attend

    side = bench.suite.sides.Side("theirs", fails)
    limits = bench.suite.measure.Limits(1e9, 1e9)
    case = tiny_cases(bench)[0]
    (record,) = bench.suite.measure.measure_case(case, [side], "cpu", limits, 0.01)
    assert record.unable == "it fails: no such kernel"
    with pytest.raises(RuntimeError):  # ours must not
        bench.suite.measure.measure_case(case, [replace(side, ours=True)], "cpu", limits, 0.01)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what the compiler uses
def test_the_compiled_sides_are_right(bench: SimpleNamespace) -> None:
    """Of one small case: compiling takes seconds."""
    (case,) = (c for c in tiny_cases(bench) if c.row.score == "dot" and not c.row.backward)
    chosen = [s for s in bench.suite.sides.sides("cpu") if s.slow or s.name == "eager"]
    limits = bench.suite.measure.Limits(1e9, 1e9)
    records = bench.suite.measure.measure_case(case, chosen, "cpu", limits, 0.01)
    found = {record.side: record for record in records}
    assert set(found) == {"eager", "compiled eager", "flex_attention"}
    assert found["compiled eager"].seconds and found["compiled eager"].first_call > 0.1
    assert found["flex_attention"].seconds or found["flex_attention"].unable


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_compiler_does_not_give_up(bench: SimpleNamespace) -> None:
    """It compiles a function for so many shapes, and runs it as it is after that."""
    chosen = [s for s in bench.suite.sides.sides("cpu") if s.name == "compiled eager"]
    limits = bench.suite.measure.Limits(1e9, 1e9)
    (case,) = (c for c in tiny_cases(bench) if c.row.score == "dot" and not c.row.backward)
    for source in (3, 5, 7):
        sizes = case.row.sizes._replace(source=source)
        longer = replace(case, row=replace(case.row, sizes=sizes))
        with torch._dynamo.config.patch(recompile_limit=1):
            (record,) = bench.suite.measure.measure_case(longer, chosen, "cpu", limits, 0.01)
        assert record.seconds is not None and not record.unable


def test_the_suite_writes_what_it_measured(
    small: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run.json"
    assert small.suite.quick.main(["--output", str(output), "--threads", "1"]) == 0
    text = capsys.readouterr().out
    for name in ("a step", "layer", "model, training", "model, greedy", "model, beam 5"):
        assert re.search(rf"^{name}  .*\d\.\d\dx", text, re.MULTILINE), name
    document = json.loads(output.read_text())
    for row in document["rows"]:
        facts = row["provenance"]
        assert facts["processor"] and facts["threads"] == 1 and facts["date"]
        assert facts["versions"]["torch"] == torch.__version__ and facts["commit"]
    run = small.suite.results.Run.load(output)
    assert {record.level for record in run.records} == {"operator", "layer", "model"}
    assert run.sizes["native module"] > 1e5
    again = tmp_path / "again.json"
    run.save(again)
    assert again.read_text() == output.read_text()


def make_run(bench: SimpleNamespace, times: dict[str, tuple[float, float]]) -> Any:
    """A run in which a call of each side took so long, with quarters so far from it."""
    timing = bench.suite.measure.Timing
    records = [
        bench.suite.measure.Record(
            "case/dot", "operator", "case", "here", "dot", "float32",
            {"batch": 1, "queries": 2, "source": 3, "width": 4}, "both", side,
            side.startswith("fused"),
            timing(median, median * (1 - spread), median * (1 + spread), 9), {"context": 1e-7},
        )
        for side, (median, spread) in times.items()
    ]  # fmt: skip
    facts = {
        "processor": "Some CPU", "instruction_set": "avx2", "cores": 2, "threads": 2,
        "versions": {"torch": "2.13"}, "commit": "abc", "date": "2026-01-02T03:04:05",
    }  # fmt: skip
    limits = bench.suite.measure.Limits(1e10, 1e11)
    growth, memory = {"dot, S": [1.0, 2.0, 4.0, 8.0]}, {"eager": {"128": 10, "256": 20}}
    return bench.suite.results.Run(facts, limits, records, growth, memory, {"package": 5})


@pytest.mark.parametrize(
    ("after", "spread", "verdict"),
    [
        (1.1, 0.01, ""),  # within 15 %
        (1.3, 0.01, "WORSE"),
        (1.3, 0.15, ""),  # within twice the noise of both
        (0.7, 0.01, "better"),
    ],
)
def test_what_counts_as_worse(
    bench: SimpleNamespace, after: float, spread: float, verdict: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    make_run(bench, {"fused (cpu)": (1.0, spread), "eager": (3.0, 0.01)}).save(first)
    make_run(bench, {"fused (cpu)": (after, spread), "eager": (3.0, 0.01)}).save(second)
    assert bench.suite.compare.main([str(first), str(second)]) == (verdict == "WORSE")
    text = capsys.readouterr().out
    assert ("WORSE" in text, "better" in text) == (verdict == "WORSE", verdict == "better")


def test_the_baseline_of_a_machine(
    bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Ratios, not times: a machine that is slower as a whole has not got worse."""
    monkeypatch.setattr(bench.suite.compare, "RESULTS", tmp_path)
    first, slower, worse = (tmp_path / f"{name}.json" for name in "abc")
    make_run(bench, {"fused (cpu)": (1.0, 0.01), "eager": (3.0, 0.01)}).save(first)
    make_run(bench, {"fused (cpu)": (5.0, 0.01), "eager": (15.0, 0.01)}).save(slower)
    make_run(bench, {"fused (cpu)": (1.5, 0.01), "eager": (3.0, 0.01)}).save(worse)
    assert bench.suite.compare.main([str(first)]) == 0
    assert "no baseline for this machine" in capsys.readouterr().out
    assert bench.suite.compare.main([str(first), "--baseline"]) == 0
    assert (tmp_path / "some-cpu-2-cores" / "baseline.json").exists()
    assert bench.suite.compare.main([str(slower)]) == 0
    assert bench.suite.compare.main([str(worse)]) == 1
    assert "3.00x  2.00x" in capsys.readouterr().out
    (tmp_path / "bad.json").write_text("{}")
    assert bench.suite.compare.main([str(tmp_path / "bad.json")]) == 2
    assert "is not a result of the suite" in capsys.readouterr().err


def test_the_page_and_the_table_of_the_readme(bench: SimpleNamespace, tmp_path: Path) -> None:
    times = {"fused (cpu)": (2e-3, 0.01), "eager": (6e-3, 0.01), "SDPA": (5e-3, 0.02)}
    results, page, readme = (tmp_path / name for name in ("r.json", "page.html", "README.md"))
    make_run(bench, times).save(results)
    readme.write_text(f"before\n{bench.suite.report.BEGIN}\nold\n{bench.suite.report.END}\nafter\n")
    options = ["--output", str(page), "--readme", str(readme), "--pictures", str(tmp_path / "svg")]
    assert bench.suite.report.main([str(results), *options]) == 0
    text = page.read_text()
    for part in ("3.00x vs eager", "Some CPU", "commit abc", "2 ms ±1%", "5 ms ±2%"):
        assert part in text, part
    assert not re.search(r"(src|href)=.?https?:", text)  # nothing from elsewhere
    assert text.count("<svg") == 3
    row = "| case, fwd+bwd | dot | (1, 2, 3, 4) | 2 ms | 3.00x | SDPA | 2.50x |"
    lines = readme.read_text().splitlines()
    assert row in lines and "old" not in lines and lines[0] == "before" and lines[-1] == "after"
    pictures = {path.name: path.read_text() for path in (tmp_path / "svg").iterdir()}
    assert set(pictures) == {"speedup.svg", "roofline.svg", "memory.svg", "growth.svg"}
    assert " 3.0x" in pictures["speedup.svg"] and "dot, S" in pictures["growth.svg"]
    readme.write_text("without marks")
    assert bench.suite.report.main([str(results), *options]) == 2
    assert readme.read_text() == "without marks"


def test_the_page_in_a_browser(bench: SimpleNamespace, tmp_path: Path) -> None:
    """No wider than a phone, and a case opens to show every side."""
    from shutil import which

    browser = which("chromium")
    if browser is None:
        pytest.skip("chromium is not installed")
    page = tmp_path / "page.html"
    times = {"fused (cpu)": (2e-3, 0.01), "eager": (6e-3, 0.01)}
    script = (
        "<script>document.querySelector('details').open = true;"
        "document.title = [document.documentElement.scrollWidth <= innerWidth,"
        "document.querySelectorAll('details tr').length,"
        "document.querySelector('details table').offsetHeight > 0].join(' ');</script>"
    )
    page.write_text(bench.suite.report.page(make_run(bench, times)).replace("</html>", script))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=390,800"]
    done = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert "<title>true 3 true</title>" in done.stdout


def test_cases_keep_the_ids_that_baselines_have(bench: SimpleNamespace) -> None:
    path = LOCATION / "results/amd-epyc-2-cores/baseline.json"
    kept = json.loads(path.read_text(encoding="utf-8"))["ratios"].keys()
    cases, models = bench.suite.cases.cases(quick=False), bench.suite.models
    known = {case.id for case in cases} | set(map(models.layer_id, models.LAYERS))
    assert kept and kept <= known | set(map(models.model_id, models.MODELS))


def test_slopes(bench: SimpleNamespace) -> None:
    assert bench.suite.pictures.slope([1.0, 2.0, 4.0, 8.0]) == pytest.approx(1.0)
    assert bench.suite.pictures.slope([3.0, 12.0, 48.0, 192.0]) == pytest.approx(2.0)


def test_bars_double(bench: SimpleNamespace) -> None:
    bar = bench.suite.results.bar
    assert [bar(ratio).strip() for ratio in (1.0, 2.0, 16.0)] == ["|", "|████", "|" + "█" * 16]
    assert bar(0.5) == "▒▒▒▒|" and bar(1e9).strip().endswith("+")


def test_memory_of_a_side(bench: SimpleNamespace) -> None:
    """In a process of its own; eager concat holds (B, T, S, A) more than once, ours does not."""
    found = {}
    for side in ("fused (cpu)", "eager"):
        command = [sys.executable, "-m", "benchmarks.suite.memory", "concat:4x64x512x256", side]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
        done = subprocess.run(
            [*command, "cpu"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        found[side] = int(done.stdout)
    tensor = 4 * 64 * 512 * 256 * 4
    assert found["eager"] > 1.5 * tensor > 3 * found["fused (cpu)"]


def test_pytest_benchmark_runs_the_cases(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    options = ["-k", "overhead", "--benchmark-max-time=0.001", "--benchmark-min-rounds=3"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [*command, *options, f"--benchmark-json={results}"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    found = json.loads(results.read_text())["benchmarks"]
    sides = {bench["name"].rpartition("-")[2].rstrip("]") for bench in found}
    assert sides >= {"fused (cpu)", "eager", "SDPA", "as Keras", "as OpenNMT"}
    assert all(bench["extra_info"]["context"] < 1e-5 for bench in found)
