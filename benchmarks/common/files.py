"""Where results are kept, and how files are written."""

from __future__ import annotations

from pathlib import Path

# Resolved: the package may be a link in a site directory.
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"


def write_whole(path: Path, text: str) -> None:
    """Write a file, and its directory if there is none. It appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f"{path.suffix}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
