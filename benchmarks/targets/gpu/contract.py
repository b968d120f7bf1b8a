"""The stage "contract": the tests of the GPU backends, given one at a time to pytest processes.

A process ends after a CUDA error, since every later test in it would fail too.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.files import ROOT
from benchmarks.targets.gpu.pool import Phase
from benchmarks.targets.gpu.worker import Channel, lost_context

PHASES = (Phase("tests", jobs=14, limit_s=100.0, start_s=120.0, in_blocks=True),)
FILES = (
    "test_backends*.py", "test_scores.py", "test_triton_call.py", "test_lifecycle.py",
)  # fmt: skip
SELECT = "triton_cuda or cuda_cuda or test_triton_call or test_a_cuda_graph"


def _arguments(options: argparse.Namespace) -> list[str]:
    found = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", f"--rootdir={ROOT}"]
    found += ["-p", "no:benchmark"] if importlib.util.find_spec("pytest_benchmark") else []
    if importlib.util.find_spec("pytest_timeout") is None:  # its setting would be an error
        found += ["-o", "addopts=", "-W", "ignore::pytest.PytestConfigWarning"]
    named = [path for name in FILES for path in sorted((ROOT / "tests").glob(name))]
    if options.tests:
        return [*found, *options.tests]
    return [*found, "-k", SELECT if options.device == "cuda" else "triton", *map(str, named)]


class _Listed:
    """Keeps the names of collected tests, and the errors of files that cannot be collected."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.errors: dict[str, str] = {}

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.errors[report.nodeid or "(collection)"] = report.longreprtext[-600:]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.names = [item.nodeid for item in session.items]


def items(phase: str, options: argparse.Namespace) -> list[str]:
    listed, printed = _Listed(), io.StringIO()
    with _in_root(), contextlib.redirect_stdout(printed):
        pytest.main([*_arguments(options), "--collect-only"], plugins=[listed])
    found = [*listed.errors, *listed.names]
    if not found and options.device == "cuda":
        raise RuntimeError(f"pytest collects no tests: {printed.getvalue()[-1500:]}")
    return found


class Plugin(_Listed):
    """Runs the tests that the channel names, instead of everything collected."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self.channel = channel
        self.reports: list[Any] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        by_name = {item.nodeid: item for item in session.items}
        for name in self.channel.received():
            self.reports = []
            if name not in by_name:
                why = self.errors.get(name, "it was not collected")
                last = (why.strip().splitlines() or [""])[-1]
                self.channel.finish(name, None, outcome="failed", error=last[:300], text=why)
                continue
            item = by_name[name]
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            lost = lost_context(self.channel.options.device)
            self.channel.finish(name, lost, **outcome(self.reports))
        return True

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.reports.append(report)


def outcome(reports: list[Any]) -> dict[str, Any]:
    """The fields of a test's line, from the reports of its setup, call and teardown."""
    for report in reports:
        if report.failed:
            text = report.longreprtext
            errors = [line for line in text.splitlines() if line.startswith("E ")]
            last = (errors or text.splitlines() or [""])[0].removeprefix("E").strip()
            shown = "\n".join(errors)[:600] or text[-600:]
            return {"outcome": "failed", "when": report.when, "error": last[:300], "text": shown}
    skipped = [report for report in reports if report.skipped]
    if skipped:
        where = skipped[0].longrepr
        why = where[2] if isinstance(where, tuple) else getattr(skipped[0], "wasxfail", "")
        return {"outcome": "skipped", "why": str(why)[:200]}
    return {"outcome": "passed"}


@contextlib.contextmanager
def _in_root() -> Iterator[None]:
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        yield
    finally:
        os.chdir(before)


def serve(channel: Channel) -> None:
    """Run a pytest session until the channel has no more items."""
    with _in_root():
        pytest.main(_arguments(channel.options), plugins=[Plugin(channel)])
