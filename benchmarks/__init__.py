"""Measurements of fused_attn against what people write by hand. `python -m benchmarks` lists them.

Each benchmark is a module with a docstring and ``main(arguments) -> int``, named in `BENCHMARKS`.
A speed is printed only for a call whose results passed the error budget in the same run.
"""

BENCHMARKS = (
    "quick", "full", "report", "compare", "swap", "claims", "cpu", "aot", "launches",
)  # fmt: skip
