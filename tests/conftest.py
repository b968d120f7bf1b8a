"""Settings for all tests: threads, the Triton interpreter, and Hypothesis profiles."""

from __future__ import annotations

import os
from collections.abc import Iterator

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if IS_WORKER:
    # The workers already run in parallel. This is set before torch is imported, so that OpenMP
    # reads it, and in the environment, so that processes started by tests inherit it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from interpreter import patch_once_a_launch  # noqa: E402

if not torch.cuda.is_available():
    # Run the Triton kernels in Triton's interpreter, on CPU tensors, with the same arithmetic.
    # Triton reads this when the first kernel is defined, here and in processes started by tests.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    patch_once_a_launch()

# No deadlines, because timings on a shared machine vary. "short" is deterministic, so that the same
# command reproduces a failure. "long" draws new examples each time, and prints how to reproduce
# a failure.
hypothesis.settings.register_profile("short", deadline=None, derandomize=True)
hypothesis.settings.register_profile("long", deadline=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))


def _scope(nodeid: str) -> str:
    """Name what runs in one worker: tests that share builds, and tests that start processes.

    xdist_group marks do that too, but xdist 3.8 loses them under pytest 9.2.
    """
    file, _, test = nodeid.partition("::")
    if file.endswith("test_packaging.py"):
        return "packaging"
    return "processes" if test.startswith("test_two_processes") else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _scope(nodeid)

    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run a test with the number of threads from its marker, and restore the number afterwards."""
    before = torch.get_num_threads()
    if marker := request.node.get_closest_marker("threads"):
        torch.set_num_threads(*marker.args)
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)
