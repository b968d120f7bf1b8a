"""`python -m benchmarks`: list the benchmarks; `python -m benchmarks NAME`: run one."""

from __future__ import annotations

import sys
from importlib import import_module

from benchmarks import BENCHMARKS


def main(arguments: list[str]) -> int:
    name, *rest = arguments or [""]
    if name in BENCHMARKS:
        return import_module(BENCHMARKS[name]).main(rest)
    if name not in ("", "-h", "--help"):
        known = ", ".join(BENCHMARKS)
        print(f"unknown benchmark {name!r}, expected one of: {known}", file=sys.stderr)
        return 2
    print("usage: python -m benchmarks NAME [--help]\n")
    for known, module in BENCHMARKS.items():
        summary = (import_module(module).__doc__ or "").splitlines()[0]
        print(f"  {known:<10}{summary}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
