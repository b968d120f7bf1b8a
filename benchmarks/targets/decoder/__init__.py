"""The native decoder against its rivals and the machine: `python -m benchmarks decoder`."""
