"""`python -m benchmarks decoder`: its sides are right, and its arithmetic, at small sizes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks_package import imported

from fused_attn import backends

pytestmark = pytest.mark.skipif(
    bool(backends.unavailable_reasons("cpu")), reason="the cpu backend is not usable here"
)
COMPUTES = ("float32", "bfloat16", "int8")
WITHHELD = "withheld"


@pytest.fixture(scope="module")
def modules() -> Iterator[SimpleNamespace]:
    with imported() as loaded:
        yield loaded


@pytest.fixture
def bench(modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules of the benchmark, with few words and a short measurement of the peak."""
    decoder = modules.targets.decoder
    monkeypatch.setattr(modules.common.machine, "PEAK_ROUNDS", 1)
    for name, count in {"SINGLE": 6, "CHUNK": 3, "SLOW": 2, "BATCHED": 12}.items():
        monkeypatch.setattr(decoder.words, name, count)
    return decoder


def tiny_sizes(bench: SimpleNamespace) -> Any:
    return bench.rows.Sizes(embedding=8, hidden=16, memory=12, source=5, symbols=30, steps=4)


def problem_of(bench: SimpleNamespace, score: str, batch: int = 3) -> Any:
    return bench.problem.make_problem(tiny_sizes(bench), score, batch)


def tiny_plan(bench: SimpleNamespace) -> Any:
    """Every row, without the side that must be compiled."""
    steps = [
        replace(row, rivals=tuple(name for name in row.rivals if name != bench.rows.COMPILED))
        for row in bench.rows.STEP_ROWS
        if row.batch == 1
    ]
    return bench.command.Plan(
        steps, bench.rows.SEARCH_ROWS[:1], bench.rows.WORD_ROWS[:2], [2], [1], tiny_sizes(bench)
    )


def run(bench: SimpleNamespace, plan: Any, *arguments: str) -> int:
    result: int = bench.command.main(["--seconds", "0", *arguments], plan)
    return result


def cells_of(text: str, label: str, kind: str) -> list[str]:
    """The cells of the table's line with this label and type of products."""
    lines = [line for line in text.splitlines() if line.startswith(f"{label}  ")]
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]
    (row,) = (row for row in rows if row[1] == kind)
    return row


def test_every_row_is_measured(
    bench: SimpleNamespace, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "figures.json"
    words = tmp_path / "words.txt"
    words.write_text("hello\nworld\nattention\nwinter\nlanguage\nmemory\n" * 2)
    plan, threads = tiny_plan(bench), torch.get_num_threads()
    assert run(bench, plan, "--json", str(path), "--words", str(words)) == 0
    text = capsys.readouterr().out
    for label in ("general, B=1", "concat, fed, B=1"):
        for kind in ("fp32", "bf16", "int8"):
            _, _, ours, floor, share, *rivals, verdict = cells_of(text, label, kind)
            assert all(cell[0].isdigit() for cell in (ours, floor, share)) and len(rivals) == 2
            assert verdict in ("ok", "SHORT")
    for label in ("beam 5, B=1", "general, B=2, threads", "general, B=1, busy"):
        assert cells_of(text, label, "fp32")[-1] in ("ok", "SHORT", "not here")
    assert WITHHELD not in text and torch.get_num_threads() == threads
    written = json.loads(path.read_text())
    assert written["provenance"]["threads"] == 1 and len(written["provenance"]["load"]) == 2
    rows = {(row["label"], row["compute"]): row for row in written["rows"]}
    row = rows["concat, fed, B=1", "float32"]
    assert set(row["seconds"]) == {"ours", "LSTMCell loop", "AttnLSTM"}
    (target,) = row["targets"]
    assert target["measured"] == row["seconds"]["AttnLSTM"] / row["seconds"]["ours"]
    assert set(row["errors"]) == set(row["seconds"])
    (word,) = (row for label, row in rows.items() if label[0] == "a word, greedy")
    assert set(word["seconds"]) == {"ours", "torch path", "g2p_en's model"}
    assert word["targets"][0]["measured"] == word["seconds"]["ours"]
    both = [label for (label, _), row in rows.items() if "two threads" in row["beside"]]
    if bench.measure.machine.cores() > 1:
        assert both == ["a word, greedy", "general, B=2, threads"]
        assert text[text.index("With two threads") :].count(", with one ") == 2
    else:
        assert both == []


@pytest.mark.parametrize("score", ["general", "concat"])
@pytest.mark.parametrize("compute", COMPUTES)
def test_a_wrong_result_has_no_time(
    bench: SimpleNamespace,
    score: str,
    compute: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = bench.ours.steps

    def steps(problem: Any, kind: str) -> Callable[[], torch.Tensor]:
        side = right(problem, kind)
        if kind != compute:
            return side
        # Another symbol, or a state that is too large; NaN would be found as well.
        return lambda: (side() - 2) % 27 + 3 if problem.chooses else 1.5 * side()

    monkeypatch.setattr(bench.ours, "steps", steps)
    plan = tiny_plan(bench).only("general, B=1" if score == "general" else "concat, fed, B=1")
    plan = replace(plan, busy=[], threads=[])
    assert run(bench, plan) == 1
    text = capsys.readouterr().out
    (row,) = plan.steps
    kind = bench.rows.SHORT[compute]
    _, _, ours, floor, *rivals, verdict = cells_of(text, row.label, kind)
    assert ours == verdict == WITHHELD and floor[0].isdigit() and len(rivals) == 2
    assert f"  {row.label}, {kind}: error of ours " in text
    assert text.count(WITHHELD) == 2


def test_a_wrong_rival_is_withheld(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = bench.measure.attn_lstm
    monkeypatch.setattr(
        bench.measure, "attn_lstm", lambda *args: lambda: right(*args)() * torch.nan
    )
    assert run(bench, tiny_plan(bench).only("concat, fed, B=1")) == 1
    row = cells_of(capsys.readouterr().out, "concat, fed, B=1", "fp32")
    assert row.count(WITHHELD) == 1 and row[2][0].isdigit() and row[-1] == "incomplete"


def test_a_rival_that_cannot_run_is_named(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(*args: object) -> Any:
        raise ImportError("no such module")

    monkeypatch.setattr(bench.measure, "attn_lstm", absent)
    assert run(bench, tiny_plan(bench).only("concat, fed, B=1")) == 0
    text = capsys.readouterr().out
    assert cells_of(text, "concat, fed, B=1", "fp32").count("not here") == 1
    assert "  concat, fed, B=1, fp32: AttnLSTM: no such module" in text


@pytest.mark.parametrize("score", ["general", "concat"])
def test_the_plain_loop_is_the_model(bench: SimpleNamespace, score: str) -> None:
    """In float64, against the model's own decoder, from its first to its last step."""
    problem = problem_of(bench, score)
    decoder, wide = bench.plain._double(problem, True)
    state = bench.plain.start(wide)
    from fused_attn.seq2seq.model.decoder import DecoderState

    fed = torch.zeros_like(state[0]) if score == "concat" else None
    expected = DecoderState((wide.hidden, wide.cell), fed)
    keys = decoder.keys(wide.memory)
    for t in range(wide.sizes.steps):
        attentional, expected, _ = wide.model.decoder(
            wide.embedded[:, t : t + 1], expected, wide.memory
        )
        x = wide.embedded[:, t]
        feed = decoder.feed if score == "concat" else decoder.advance
        state = feed(x, state, wide.memory, keys)
        torch.testing.assert_close(state[2], attentional[:, 0])
        torch.testing.assert_close(state[0], expected.hidden[0][0])


def test_attn_lstm_does_the_same_work(bench: SimpleNamespace) -> None:
    problem = problem_of(bench, "concat")
    found = bench.attn_lstm.attn_lstm(problem, 1)()
    without = bench.plain.oracle_hidden(problem, squash=False)
    torch.testing.assert_close(found.double(), without, atol=1e-5, rtol=0)
    with_tanh = bench.plain.oracle_hidden(problem, squash=True)
    assert float((found.double() - with_tanh).abs().max()) > 1e-3


@pytest.mark.parametrize("side", ["loop", "torch path", *COMPUTES])
def test_the_sides_choose_the_best_symbols(bench: SimpleNamespace, side: str) -> None:
    problem = problem_of(bench, "general")
    with torch.no_grad():
        if side == "loop":
            symbols = bench.plain.loop(problem)()
        elif side == "torch path":
            symbols = bench.torch_path.steps(problem)()
        else:
            symbols = bench.ours.steps(problem, side)()
    assert symbols.shape == (3, 4) and int(symbols.min()) > 2
    error, limit = bench.measure.error_of(problem, side, symbols)
    assert error <= limit
    other = symbols.clone()
    other[1, 2] = (other[1, 2] + 1) % 30
    assert bench.measure.error_of(problem, side, other)[0] > limit


def test_error_of_symbols(bench: SimpleNamespace) -> None:
    logits = torch.tensor([[[1.0, 3.0, -1.0], [0.0, 0.0, 6.0]]], dtype=torch.float64)
    error = bench.problem.error_of_symbols
    assert error(torch.tensor([[1, 2]]), logits) == 0
    # The deviations are 2 and sqrt(12).
    assert error(torch.tensor([[0, 2]]), logits) == pytest.approx(1.0)
    assert error(torch.tensor([[0, 0]]), logits) == pytest.approx(6 / 12**0.5)


def test_numpy_words_compute_a_gru(bench: SimpleNamespace) -> None:
    model = bench.numpy_words.NumpyG2P()
    cell = torch.nn.GRUCell(256, 256)
    with torch.no_grad():
        for parameter, value in zip(cell.parameters(), model.decoder, strict=True):
            parameter.copy_(torch.from_numpy(value))
        x, state = torch.randn(1, 256), torch.randn(1, 256)
        expected = cell(x, state)
    found = bench.numpy_words.gru_cell(x.numpy(), state.numpy(), *model.decoder)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    assert len(model.predict([3, 4, 2], 5)) == 5
    words = bench.numpy_words.words_call([(4, 3), (7, 0)])()
    assert [len(word) for word in words] == [4, 1]


def result_of(bench: SimpleNamespace, **fields: Any) -> Any:
    return bench.figures.Result("case", "float32", **fields)


@pytest.mark.parametrize(
    ("target", "value", "is_met", "shown"),
    [
        (("floors", 1.4), 2.0, False, "2 floors (<= 1.4 floors) SHORT"),
        (("peak", 0.25), 0.25, True, "25% of peak (>= 25% of peak)"),
        (("speedup", 1.8, "loop"), 3.0, True, "3x loop (>= 1.8x loop)"),
        (("seconds", 1e-3), 2e-3, False, "2 ms (<= 1 ms) SHORT"),
        (("rate", 400), 500.0, True, "500 words/s (>= 400 words/s)"),
        (("threads", 1.8), 1.6, False, "1.6x one thread (>= 1.8x one thread) SHORT"),
        (("busy", 2.5), 2.0, True, "2x quiet (<= 2.5x quiet)"),
    ],
)
def test_targets(
    bench: SimpleNamespace, target: tuple[Any, ...], value: float, is_met: bool, shown: str
) -> None:
    """Ours takes 2 ms, the loop 6; the floor is 1 ms of reads and 0.5 of multiply-adds."""
    floor = bench.floors.Floor(1e-3, 0.5e-3, 1e9, 1e9, 1e-3)
    beside = {"one thread": 1.6, "two threads": 1.0, "quiet": 0.5, "busy": 1.0}
    result = result_of(
        bench, seconds={"ours": 2e-3, "loop": 6e-3}, floor=floor, beside=beside,
        targets=(bench.rows.Target(*target),),
    )  # fmt: skip
    (own,) = result.targets
    assert result.value(own) == pytest.approx(value)
    assert bool(result.short()) != is_met and result.verdict == ("ok" if is_met else "SHORT")
    assert list(bench.figures.verdicts(result)) == [shown]


def test_what_was_not_measured_has_no_verdict(bench: SimpleNamespace) -> None:
    target = bench.rows.Target("speedup", 2.0, "loop")
    alone = result_of(bench, seconds={"ours": 1.0}, targets=(target,))
    assert alone.value(target) is None and alone.verdict == "incomplete" and not alone.short()
    assert replace(alone, targets=()).verdict == ""
    assert replace(alone, missing={"ours": "reason"}).verdict == "not here"
    for error, wrong in ((0.1, []), (0.3, ["ours"]), (float("nan"), ["ours"])):
        assert replace(alone, errors={"ours": (error, 0.2)}).wrong == wrong
    assert replace(alone, errors={"ours": (1.0, 0.2)}).verdict == WITHHELD


def test_neighbours_spin_and_end(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.neighbours.machine, "cores", lambda: 1)
    started: list[Any] = []
    popen = bench.neighbours.subprocess.Popen

    def spy(*args: Any, **rest: Any) -> Any:
        started.append(popen(*args, **rest))
        return started[-1]

    monkeypatch.setattr(bench.neighbours.subprocess, "Popen", spy)
    with pytest.raises(KeyError), bench.neighbours.busy_cores():
        (process,) = started
        before, end = _ticks(process.pid), time.monotonic() + 20
        while _ticks(process.pid) == before and time.monotonic() < end:
            time.sleep(0.02)
        assert _ticks(process.pid) > before
        raise KeyError
    assert process.poll() is not None


def _ticks(pid: int) -> int:
    """Processor time of a process so far, in ticks of the system."""
    if not os.path.exists("/proc"):
        pytest.skip("processor time is read from /proc, which this system lacks")
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_word_lists(bench: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("\n".join(f"w{n}" for n in range(10)))
    assert bench.words.word_list(path, 3) == ["w0", "w3", "w6"]
    assert len(bench.words.word_list(path, 20)) == 10
    words = bench.words.word_list(None, 50)
    assert len(set(words)) == 50


def test_rows_are_chosen_by_their_labels(bench: SimpleNamespace) -> None:
    plan = bench.command.Plan()
    chosen = plan.only("BEAM 5")
    assert [row.label for row in chosen.searches] == ["beam 5, B=1", "beam 5, B=32"]
    assert [row.label for row in chosen.words] == ["words in batches, beam 5"]
    assert not (chosen.steps or chosen.threads or chosen.busy)
    assert plan.only("busy").busy == [1, 32] and plan.only("threads").threads == [1, 2, 8, 32]
    labels = [row.label for row in (*plan.steps, *plan.searches, *plan.words)]
    assert len(set(labels)) == len(labels)
