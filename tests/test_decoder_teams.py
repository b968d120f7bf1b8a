"""Threads that share the products of a block: the same bits, whatever the helpers do."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn.seq2seq.config import ModelConfig, SearchConfig
from fused_attn.seq2seq.data.examples import pad
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.search.packed import PackedModels

native = pytest.importorskip("fused_attn._C", exc_type=ImportError)
native.bind_torch(torch)
checks: ModuleType = native.decoder_checks

COMPUTES = ("float32", "bfloat16", "int8")
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
LIMIT_S = 20.0  # for what takes milliseconds on a quiet machine

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
every_isa = pytest.mark.parametrize("isa", native.cpu_isas_supported())


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    isa, threads = native.cpu_isa(), torch.get_num_threads()
    yield
    native.set_cpu_isa(isa)
    torch.set_num_threads(threads)
    checks.pause_helpers(0)


@pytest.fixture
def make_team() -> Iterator[Callable[..., Any]]:
    teams: list[Any] = []

    def make(helpers: int, present: int | None = None, patience_ms: int = 10_000) -> Any:
        """With more patience than any share takes, the result of every helper is used."""
        teams.append(checks.Team(helpers, helpers if present is None else present, patience_ms))
        return teams[-1]

    yield make
    for team in teams:
        team.close()


def operands(compute: str, rows: int, panels: int = 5) -> tuple[Any, Tensor, Tensor]:
    """Weights of so many panels, the last one not full, of 64 KiB each; rows with a stride."""
    torch.manual_seed(rows)
    inputs, outputs = 256 * 4 // BYTES[compute], 64 * panels - 27
    weights = checks.PackedWeights(compute, torch.randn(outputs, inputs))
    return weights, torch.randn(rows, inputs + 3)[:, :inputs], torch.randn(rows, outputs + 5)


def product(by: Any, weights: Any, x: Tensor, start: Tensor | None, outputs: int) -> Tensor:
    out = torch.full((x.shape[0], outputs + 9), torch.nan)
    by.product(weights, x, start, out[:, :outputs])
    assert out[:, outputs:].isnan().all()
    return out[:, :outputs]


@every_isa
@pytest.mark.parametrize("compute", COMPUTES)
def test_shares_have_the_bits_of_one_thread(
    compute: str, isa: str, make_team: Callable[..., Any]
) -> None:
    native.set_cpu_isa(isa)
    for helpers in (1, 2, 4):
        team = make_team(helpers)
        wait_for(team, helpers)
        for rows in (1, 2, 7, 17, 37):
            compare(team, *operands(compute, rows))
        assert team.redone == 0
        team.close()


def wait_for(team: Any, helpers: int) -> None:
    """Until all helpers are there: each takes a share of a product."""
    weights, x, start = operands("float32", 1)
    end = time.monotonic() + LIMIT_S
    found = 0
    while found < helpers and time.monotonic() < end:
        before = team.taken
        product(team, weights, x, None, start.shape[1] - 5)
        found = team.taken - before
    assert found == helpers, "not all helpers take part"


def compare(team: Any, weights: Any, x: Tensor, start: Tensor) -> None:
    """Products of a team with those of a thread, for each kind of start."""
    outputs = start.shape[1] - 5
    for begin in (None, start[0, :outputs].clone(), start[:, :outputs]):
        expected = product(checks, weights, x, begin, outputs)
        for _ in range(2):
            assert torch.equal(product(team, weights, x, begin, outputs), expected)
    inside = start[:, :outputs].clone()  # the start is where the result goes, as for gates
    team.product(weights, x, inside, inside)
    assert torch.equal(inside, expected)


def test_a_late_helper_is_left_behind_and_changes_nothing(make_team: Callable[..., Any]) -> None:
    """Its rows and its results are overwritten while it is at work with the old ones."""
    weights, x, start = operands("float32", 3)
    outputs = start.shape[1] - 5
    team = make_team(1, patience_ms=50)
    wait_for(team, 1)
    checks.pause_helpers(600)
    inputs, out = x.clone(), start[:, :outputs].clone()
    expected = product(checks, weights, inputs, out, outputs)
    taken, redone, begin = team.taken, team.redone, time.monotonic()
    team.product(weights, inputs, out, out)
    assert torch.equal(out, expected)
    assert (team.taken, team.redone) == (taken, redone + 1)
    for _ in range(3):  # without the helper
        inputs.normal_()
        out.normal_()
        expected = product(checks, weights, inputs, out, outputs)
        team.product(weights, inputs, out, out)
        assert torch.equal(out, expected)
        if time.monotonic() - begin < 0.5:
            assert (team.taken, team.redone) == (taken, redone + 1)
    checks.pause_helpers(0)
    kept = out.clone()
    time.sleep(0.8)
    assert torch.equal(out, kept)  # the late results went nowhere
    wait_for(team, 1)  # it comes back
    compare(team, weights, x, start)


def test_helpers_that_never_come_are_not_waited_for(make_team: Callable[..., Any]) -> None:
    weights, x, start = operands("float32", 2)
    outputs = start.shape[1] - 5
    team = make_team(3, present=0)
    for _ in range(5):
        assert torch.equal(
            product(team, weights, x, None, outputs), product(checks, weights, x, None, outputs)
        )
    assert (team.taken, team.redone) == (0, 0)


def test_small_products_are_not_shared(make_team: Callable[..., Any]) -> None:
    _, x, _ = operands("float32", 2)
    team = make_team(1)
    wait_for(team, 1)
    taken = team.taken
    small = checks.PackedWeights("float32", torch.randn(120, 240))  # two panels of 60 KiB
    for _ in range(20):
        product(team, small, x[:, :240], None, 120)
    assert team.taken == taken


def model_of(**options: Any) -> Seq2Seq:
    """Its matrices are large enough to be shared in every type of the products."""
    torch.manual_seed(0)
    config = {"hidden": 256, "embedding": 40, "bidirectional": True} | options
    return Seq2Seq(ModelConfig(**config), 50, 60).eval()


SEARCHES = {
    "greedy": SearchConfig(max_length=8),
    "beam": SearchConfig(beam=3, nbest=3, max_length=8),
    "drawn": SearchConfig(sample=True, seed=3, max_length=8),
}
MODELS: dict[str, dict[str, Any]] = {
    "lstm": {"layers": 2, "input_feeding": True},
    "gru": {"cell": "gru", "score": "concat", "coverage": True},
    "rnn": {"cell": "rnn", "local": "predictive", "window": 3},
}


@every_isa
@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("name", MODELS)
def test_searches_of_few_rows_have_the_same_bits_on_any_threads(
    name: str, compute: str, isa: str
) -> None:
    native.set_cpu_isa(isa)
    models = PackedModels([model_of(**MODELS[name])], compute)
    source, lengths = pad([[5, 9, 4, 30], [7], [8, 3, 3, 20, 21, 40, 9], [11, 12], [4] * 5])
    for search, config in SEARCHES.items():
        for count in (1, 2, 5):
            rows = source[:count], lengths[:count], torch.full((count,), 8)
            found = []
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                found.append(models.search(*rows, config, None, True))
            for other in found[1:]:
                assert_same(found[0], other, f"{search}, {count} rows")


def assert_same(one: list[Any], other: list[Any], where: str) -> None:
    for mine, theirs in zip(one, other, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert (a.tokens, a.log_prob, a.score) == (b.tokens, b.log_prob, b.score), where
            assert a.token_log_probs == b.token_log_probs, where
            assert torch.equal(a.weights, b.weights), where


def test_calls_at_the_same_time_share_the_helpers() -> None:
    models = PackedModels([model_of(layers=2)])
    source, lengths = pad([[5, 9, 4, 30, 8]])
    torch.set_num_threads(3)

    def call(_: int) -> list[Any]:
        return models.search(source, lengths, torch.tensor([12]), SEARCHES["greedy"], None, True)

    expected = call(0)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(call, range(40)):
            assert_same(found, expected, "a call beside others")


PRELUDE = """
import os, sys, torch
from fused_attn.seq2seq.config import ModelConfig, SearchConfig
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.search.packed import PackedModels
torch.manual_seed(0)
def search(hidden):
    model = Seq2Seq(ModelConfig(hidden=hidden, embedding=16), 50, 60).eval()
    rows = torch.tensor([[5, 9, 4]]), torch.tensor([3]), torch.tensor([8])
    return PackedModels([model]).search(*rows, SearchConfig())[0][0].tokens
def threads():
    return len(os.listdir("/proc/self/task"))
torch.set_num_threads(3)
"""


def run_alone(script: str) -> str:
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_sentence_has_helpers_if_the_model_is_large_enough() -> None:
    printed = run_alone(
        """
        search(16)
        before = threads()
        search(16)
        small = threads() - before
        search(256)
        print(small, threads() - before)
        torch.set_num_threads(2)
        search(256)
        print(threads() - before)
        """
    )
    helpers = str(min(3, CORES) - 1)  # more threads than cores would only wait for one another
    assert printed.split() == ["0", helpers, helpers]


@pytest.mark.skipif(CORES < 2, reason="there is one core only")
def test_helpers_run_on_the_cores_of_their_leader() -> None:
    """They are not asked for if that is one core, and move when the leader may use other cores."""
    printed = run_alone(
        """
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[:1])
        torch.set_num_threads(2)
        before = set(os.listdir("/proc/self/task"))
        search(256)
        print(len(set(os.listdir("/proc/self/task")) - before))
        os.sched_setaffinity(0, cores[-2:])
        search(256)
        (helper,) = map(int, set(os.listdir("/proc/self/task")) - before)
        print(sorted(os.sched_getaffinity(helper)) == cores[-2:])
        """
    )
    assert printed.split() == ["0", "True"]


@pytest.mark.skipif(CORES < 2, reason="there is one core only")
@pytest.mark.parametrize("count", [1, 40], ids=["shared", "in blocks"])
def test_threads_compute_in_the_float_mode_of_their_caller(count: int) -> None:
    """Helpers are there before the mode is set, which changes the logits."""
    printed = run_alone(
        f"""
        model = Seq2Seq(ModelConfig(hidden=256, embedding=16), 50, 600).eval()
        with torch.no_grad():
            model.output.weight[-1] *= 1e-38  # few, as processors take long for them
            model.output.bias.zero_()
        made = PackedModels([model])._models[0]
        source, lengths = torch.full(({count}, 5), 7), torch.full(({count},), 5)
        inputs = torch.full(({count}, 4), 3)
        def logits(threads):
            memory, hidden, cell = made.encode(source, lengths, threads)
            state = (hidden, cell, None, None, 0)
            found = made.run_steps(inputs, memory, lengths, state, False, threads)[1]
            return found.view(torch.int32)
        plain = logits(2)
        assert torch.set_flush_denormal(True)
        every = [logits(2) for _ in range(20)]
        one = logits(1)
        print(not torch.equal(plain, one), all(torch.equal(each, one) for each in every))
        """
    )
    assert printed.split() == ["True", "True"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_decodes_without_helpers() -> None:
    printed = run_alone(
        """
        torch.manual_seed(1)
        expected = search(256)
        sys.stdout.flush()
        child = os.fork()
        if not child:
            torch.manual_seed(1)
            os._exit(0 if search(256) == expected else 7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """
    )
    assert printed.split() == ["0"]
