"""The whole suite, with compiled rivals, peak memory, growth and whole models; ten minutes."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.suite.run import default_path, finish, parser, run

_SECONDS = 4.0  # about, for each case


def main(arguments: Sequence[str]) -> int:
    options = parser("full", __doc__ or "").parse_args(arguments)
    found = run(options, quick=False, budget_s=_SECONDS)
    return finish(found, options, default_path(found))
