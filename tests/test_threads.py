"""The thread pool shared by torch and the kernels, concurrent calls, and fork.

Tests that need a fresh process, or that could hang, run in their own process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from targets import TARGETS, Target

from fused_attn import testing
from fused_attn.testing import Case, Tensors

CPU_TARGETS = [target for target in TARGETS if getattr(target, "backend", None) == "cpu"]

pytestmark = [
    pytest.mark.skipif(not CPU_TARGETS, reason="the cpu backend is not usable here"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and forks"),
]

# Much more work than the threshold at which a call uses several threads.
PRELUDE = """
import os
import torch
from fused_attn import testing
from fused_attn.testing import Case

CASES = [Case(score, batch=4, queries=24, source=200, memory_dim=64, attn_dim=64)
         for score in ("dot", "projected")]
INPUTS = [testing.make_inputs(case) for case in CASES]

def attend():
    return [testing.fused(inputs, "cpu") for inputs in INPUTS]  # forward and backward

def judge(found):
    for inputs, got in zip(INPUTS, found, strict=True):
        testing.check_results(got, testing.oracle(inputs), testing.plain(inputs))

def use_torchs_pool():
    torch.randn(1 << 20).exp().sum()
    torch.randn(512, 512) @ torch.randn(512, 512)

def tasks():
    return len(os.listdir("/proc/self/task"))
"""


def run_alone(script: str, **environment: str) -> list[int]:
    """Run the script in a fresh process. Returns the numbers that it printed."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env={name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
        | environment,
    )
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def test_torch_and_the_kernels_share_one_pool() -> None:
    before, after, runtimes = run_alone("""
        torch.set_num_threads(2)
        use_torchs_pool()
        before = tasks()
        judge(attend())
        with open("/proc/self/maps") as maps:
            files = {line.split()[-1] for line in maps if "/" in line}
        runtimes = ("libgomp", "libomp", "libiomp")
        loaded = [file for file in files if os.path.basename(file).startswith(runtimes)]
        print(before, tasks(), len(loaded))
    """)
    assert after == before
    assert runtimes == 1


def test_the_pool_is_used_and_is_of_the_size_asked_for() -> None:
    """Otherwise the other tests' counts could be equal because nothing ran in parallel."""
    script = """
        torch.set_num_threads(1)
        before = tasks()
        counts = []
        for threads in (2, 3):
            torch.set_num_threads(threads)
            start = tasks()  # torch may start threads of other pools here
            attend()
            counts.append(tasks() - start)
        print(before, *counts)
    """
    before, two, three = run_alone(script, OMP_NUM_THREADS="1")  # so inputs do not start the pool
    assert before >= 1
    assert (two, three) == (1, 1)  # one thread in addition to the caller, then one more


def test_one_thread_means_that_none_is_started() -> None:
    before, after = run_alone("""
        torch.set_num_threads(1)
        before = tasks()
        judge(attend())
        print(before, tasks())
    """)
    assert after == before


def results(target: Target, score: str, seed: int) -> Tensors:
    case = Case(score, batch=3, queries=17, source=300, memory_dim=48, attn_dim=40, lengths=True)
    return testing.fused(testing.make_inputs(case, seed), target.backend)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("target", CPU_TARGETS, ids=str)
def test_calls_at_once_give_the_bits_of_calls_alone(target: Target, threads: int) -> None:
    calls = [("dot", 0), ("projected", 1), ("dot", 2), ("projected", 3)]
    start = threading.Barrier(len(calls))

    def repeat(call: tuple[str, int]) -> list[Tensors]:
        torch.set_num_threads(threads)  # this setting is per thread
        start.wait(timeout=60)
        return [results(target, *call) for _ in range(20)]

    torch.set_num_threads(threads)
    with target.active():
        alone = [results(target, *call) for call in calls]
        with ThreadPoolExecutor(len(calls)) as pool:
            found = list(pool.map(repeat, calls))
    for expected, rounds in zip(alone, found, strict=True):
        for got in rounds:
            assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_threads_compute_in_the_float_mode_of_their_caller() -> None:
    """Threads that were there before the mode was set, which changes the result."""
    flushed, same = run_alone("""
        from fused_attn import functional
        query, memory = torch.randn(4, 24, 64), torch.randn(4, 200, 64) * 1e-38
        def attended(threads):
            torch.set_num_threads(threads)
            return functional.dot_attention(query, memory, backend="cpu")[0].view(torch.int32)
        plain = attended(2)
        assert torch.set_flush_denormal(True)
        two, one = attended(2), attended(1)
        print(int(not torch.equal(plain, one)), int(torch.equal(one, two)))
    """)
    assert (flushed, same) == (1, 1)


FORK = """
torch.set_num_threads(2)
use_torchs_pool()
judge(attend())  # the pool is up: its threads are not there in a child
"""


def test_a_forked_child_with_one_thread_is_right() -> None:
    """As with torch, a child must not use its parent's pool, so it sets one thread."""
    (status,) = run_alone(
        FORK
        + textwrap.dedent("""
        child = os.fork()
        if not child:
            torch.set_num_threads(1)
            try:
                judge(attend())
            except BaseException:
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(status)
        """)
    )
    assert status == 0


def test_a_forked_child_that_keeps_its_threads_does_not_wait_for_its_parents() -> None:
    """torch's own operations would hang there; the kernels run on the calling thread."""
    (status,) = run_alone(
        FORK
        + textwrap.dedent("""
        import signal
        def bits(tensor):
            return tensor.numpy().tobytes()
        expected = attend()
        child = os.fork()
        if not child:
            signal.alarm(60)  # ends a child that hangs
            try:
                assert torch.get_num_threads() == 2
                for got, right in zip(attend(), expected, strict=True):
                    assert all(bits(got[name]) == bits(right[name]) for name in right)
            except BaseException:
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(status)
        """)
    )
    assert status == 0


def test_a_worker_of_a_data_loader_is_right() -> None:
    """It is forked from a process with a pool, and torch sets it to one thread."""
    threads, items = run_alone(
        FORK
        + textwrap.dedent("""
        from torch.utils.data import DataLoader, Dataset

        class Judged(Dataset):
            def __len__(self):
                return 3
            def __getitem__(self, index):
                judge(attend())
                return torch.get_num_threads()

        loader = DataLoader(
            Judged(), batch_size=None, num_workers=1, timeout=60, multiprocessing_context="fork"
        )
        threads = list(loader)
        judge(attend())  # and the parent still works
        print(max(threads), len(threads))
        """)
    )
    assert (threads, items) == (1, 3)
