"""Measurements of fused_attn against what people write by hand. `python -m benchmarks` lists them.

Each benchmark is a module with a docstring and ``main(arguments) -> int``, named in `BENCHMARKS`.
A speed is printed only for a call whose results passed the error budget in the same run.
"""

# The module of each name, in the order of the list.
BENCHMARKS = {
    "quick": "benchmarks.suite.quick",
    "full": "benchmarks.suite.full",
    "report": "benchmarks.suite.report",
    "compare": "benchmarks.suite.compare",
    "swap": "benchmarks.swap",
    "claims": "benchmarks.claims.command",
    "cpu": "benchmarks.targets.cpu.command",
    "decoder": "benchmarks.targets.decoder.command",
    "aot": "benchmarks.aot.command",
    "launches": "benchmarks.aot.launches",
}
