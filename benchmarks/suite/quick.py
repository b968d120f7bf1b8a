"""The suite in two minutes: the most important cases, ours against what people use."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.suite import compare
from benchmarks.suite.run import finish, parser, run

_SECONDS = 1.5  # about, for each case


def main(arguments: Sequence[str]) -> int:
    asked = parser("quick", __doc__ or "")
    asked.add_argument(
        "--check",
        action="store_true",
        help="list ratios that fell below the machine's baseline",
    )
    options = asked.parse_args(arguments)
    found = run(options, quick=True, budget_s=_SECONDS)
    code = finish(found, options)
    return max(code, compare.check(found)) if options.check else code
