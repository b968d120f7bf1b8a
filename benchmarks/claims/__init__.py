"""What attention is for, by experiment: `python -m benchmarks claims`."""
