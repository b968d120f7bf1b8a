"""The cpu backend against its targets: `python -m benchmarks cpu`."""
