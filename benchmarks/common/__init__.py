"""What the benchmarks share: calls and their sides, judging, timing, the machine, tables."""
