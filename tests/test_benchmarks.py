"""The benchmarks: they run, they measure what they say, and a wrong result has no speed."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmarks_package import ROOT, imported

from fused_attn.seq2seq.model.seq2seq import Seq2Seq


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    with imported() as modules:
        yield modules


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_without_a_name_it_lists_the_benchmarks() -> None:
    done = run()
    assert done.returncode == 0 and not done.stderr
    assert "python -m benchmarks NAME" in done.stdout
    assert "  quick     The suite in two minutes" in done.stdout
    assert "  cpu       The cpu backend against eager PyTorch" in done.stdout
    assert "  decoder   The native decoder against a loop over LSTMCell" in done.stdout


def test_an_unknown_name_is_refused() -> None:
    done = run("qiuck")
    assert (done.returncode, done.stdout) == (2, "")
    known = "quick, full, report, compare, swap, claims, cpu, decoder, aot, launches"
    assert done.stderr == f"unknown benchmark 'qiuck', expected one of: {known}\n"


def test_every_listed_benchmark_can_be_run(bench: SimpleNamespace) -> None:
    for name in bench.BENCHMARKS.values():
        module = importlib.import_module(name)
        assert callable(module.main) and module.__doc__


def test_calls_take_turns(bench: SimpleNamespace) -> None:
    order: list[str] = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    bench.common.measure.medians(calls, budget_s=10.0, rounds=4, window_s=0.0)
    assert "".join(order) == "ab" * 5  # one to warm up, and four rounds


def test_a_turn_is_announced_before_it(bench: SimpleNamespace) -> None:
    order: list[str] = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    announce = lambda name: order.append(name.upper())  # noqa: E731
    bench.common.measure.medians(calls, budget_s=10.0, rounds=3, window_s=0.0, before=announce)
    assert "".join(order) == "AaBb" * 4


def test_median_seconds_of_a_call(bench: SimpleNamespace) -> None:
    found = bench.common.measure.medians(
        {"long": lambda: time.sleep(0.02), "short": lambda: time.sleep(0.001)}, 0.2, window_s=0.005
    )
    # Sleeping takes at least as long as asked for; a busy machine may add to it.
    assert 0.02 <= found["long"] < 0.2
    assert 0.001 <= found["short"] < found["long"]


def test_few_rounds_when_time_is_short(bench: SimpleNamespace) -> None:
    calls = []
    bench.common.measure.medians(
        {"slow": lambda: (calls.append(1), time.sleep(0.02))}, budget_s=0.0
    )
    assert len(calls) == 4  # one to warm up, and the least number of rounds


def test_columns_line_up(bench: SimpleNamespace) -> None:
    text = bench.common.table.render(["name", "n"], [["a", "1000"], ["longer", "7"]])
    assert text.splitlines() == [
        "name       n",
        "------  ----",
        "a       1000",
        "longer     7",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.5, "2.5 s"), (0.01234, "12.3 ms"), (4.5e-6, "4.5 us"), (3e-9, "3 ns")],
)
def test_durations(bench: SimpleNamespace, seconds: float, text: str) -> None:
    assert bench.common.table.duration(seconds) == text


TINY = {"vocab": 11, "dim": 8, "batch": 3, "source": 5, "target": 4}


def test_a_swapped_model_agrees(bench: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.swap.main(["--seconds", "0.01"], TINY) == 0
    rows = capsys.readouterr().out.splitlines()[-3:]
    assert [row.split()[0] for row in rows] == ["dot", "general", "mlp"]
    assert all(row.count(" -> ") == 2 and row.endswith("x") for row in rows)


def test_a_model_that_computes_something_else_has_no_speed(
    bench: SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(model: torch.nn.Module) -> None:
        with torch.no_grad():
            model.attn.linear_out.weight.mul_(1.01)

    monkeypatch.setattr(bench.swap.interop, "swap", spoil)
    assert bench.swap.main(["--seconds", "0.01"], TINY) == 1
    rows = capsys.readouterr().out.splitlines()[-3:]
    assert all(row.split()[-4:] == ["withheld"] * 4 for row in rows)


def test_claims_writes_tables_and_a_picture(bench: SimpleNamespace, tmp_path: Path) -> None:
    """Of models that have learned little: what the figures say is for the whole run."""
    assert bench.claims.command.main(["--quick", "--output", str(tmp_path)]) == 0
    text = (tmp_path / "claims.md").read_text()
    tables = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    for name in (
        "no attention, source reversed",
        "dot",
        "general",
        "concat",
        "none: teacher forcing",
    ):
        assert name in tables
    values = json.loads((tmp_path / "claims.json").read_text())
    assert set(values["right"]["dot"]) == {"5", "10", "15"}
    assert all(len(found) == 2 for found in values["right"]["dot"].values())
    # The recurrence carries next to nothing over 80 steps, attention does.
    gradient = {name: sum(values["gradient"][name]["80"]) for name in ("no attention", "dot")}
    assert gradient["dot"] > 1e6 * gradient["no attention"] > 0
    assert (tmp_path / "claims.svg").read_text().count("source length") == 1


def test_gradients_by_distance_are_those_of_the_embedding(bench: SimpleNamespace) -> None:
    """Against a finite difference of the loss, for one sentence of the batch."""
    experiments = bench.claims.experiments
    torch.manual_seed(0)
    model = Seq2Seq(experiments.shape_of("dot", hidden=8, embedding=4), 23, 23).double()
    (norm,) = experiments.gradient_norms(model, [5]).values()
    generator = torch.Generator().manual_seed(5)
    source = torch.randint(3, 23, (64, 5), generator=generator)
    squares = torch.zeros(64)
    for column in range(4):
        losses = []
        for step in (1e-5, -1e-5):

            def shifted(module: object, inputs: object, output: torch.Tensor) -> torch.Tensor:
                output = output.clone()
                output[:, 0, column] += step  # noqa: B023, it is called at once
                return output

            hook = model.source_embedding.register_forward_hook(shifted)
            logits, _ = model(source, torch.full((64,), 5), torch.ones(64, 1, dtype=torch.long))
            hook.remove()
            log_probs = logits[:, 0].log_softmax(dim=-1)
            losses.append(-log_probs.gather(1, source[:, :1])[:, 0].detach())
        squares += ((losses[0] - losses[1]) / 2e-5) ** 2
    assert norm == pytest.approx(squares.sqrt().mean().item(), rel=1e-4)
