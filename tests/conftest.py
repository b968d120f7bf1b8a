"""Settings that every test shares: threads, and hypothesis without a clock."""

from __future__ import annotations

import os
from collections.abc import Iterator

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if IS_WORKER:
    # The workers are the parallelism. Before torch is imported, so that OpenMP reads it, and in
    # the environment, so that the processes that tests start inherit it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from interpreter import patch_once_a_launch  # noqa: E402

if not torch.cuda.is_available():
    # The Triton kernels then run in Triton's interpreter, on CPU tensors: the same arithmetic. Read
    # when the first kernel is defined, here and in processes that tests start.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    patch_once_a_launch()

# A shared machine has no deadlines. "short": a failure must come back with the same command.
# "long" draws anew each time, and prints what brings a failure back.
hypothesis.settings.register_profile("short", deadline=None, derandomize=True)
hypothesis.settings.register_profile("long", deadline=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run the test with the threads that its marker asks for, and leave no other number behind."""
    before = torch.get_num_threads()
    if marker := request.node.get_closest_marker("threads"):
        torch.set_num_threads(*marker.args)
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)
