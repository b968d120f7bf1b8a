"""Small runs of the command `train pairs`, started and resumed in tests."""

from __future__ import annotations

from pathlib import Path

from fused_attn.cli import main

SMALL = ["--hidden", "8", "--embedding", "8", "--batch-size", "8", "--threads", "1"]


def train(run: Path, lines: Path, *options: str) -> int:
    """Start a run whose development set is its training data; return the exit code."""
    data = ["--train", str(lines), "--dev", str(lines)]
    return main(["train", "pairs", *data, "--output", str(run), *SMALL, *options])


def resume(run: Path, *options: str) -> int:
    """Resume a run; return the exit code."""
    return main(["train", "pairs", "--output", str(run), "--resume", "--threads", "1", *options])
