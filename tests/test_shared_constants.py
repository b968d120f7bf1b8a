"""Constants that Python, Triton and C++ each have a copy of: one per language, and all equal."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from fused_attn import ops, prepared
from fused_attn.backends import cuda

ROOT = Path(__file__).resolve().parent.parent


def constants(folder: str, pattern: str) -> list[str]:
    """What the group of ``pattern`` matches in all sources below ``folder``."""
    files = sorted(path for path in (ROOT / folder).rglob("*") if path.is_file())
    sources = [path for path in files if path.suffix in (".py", ".h", ".cpp", ".cu")]
    assert sources
    found = (re.findall(pattern, path.read_text(encoding="utf-8")) for path in sources)
    return [text for texts in found for text in texts]


def test_the_largest_projection_with_an_exponential_is_the_same() -> None:
    cpp = constants("csrc", r"constexpr \w+ \w*Largest(?:Projection|Factor)\w* = ([\d.]+)f;")
    triton = constants("kernels", r"LARGEST_PROJECTION = tl\.constexpr\(([\d.]+)\)")
    assert [float(text) for text in cpp + triton] == [prepared.LARGEST_PROJECTION] * 2
    literals = constants("csrc", r"\b43\.0f?\b") + constants("kernels", r"\b43\.0\b")
    assert len(literals) == 2  # nobody else writes the number


def test_exponentials_within_the_bound_are_finite() -> None:
    bound = torch.tensor([-prepared.LARGEST_PROJECTION, prepared.LARGEST_PROJECTION])
    for dtype in (torch.float32, torch.bfloat16):
        exps = torch.exp(2.0 * bound).to(dtype)
        assert exps.isfinite().all() and (exps > 0).all()


def test_the_limits_of_the_cuda_backend_are_the_same() -> None:
    assert constants("csrc/cuda", r"kMostQueries = (\d+);") == [str(cuda.MOST_QUERIES)]
    assert constants("csrc/cuda", r"kLargestWidth = (\d+);") == [str(cuda.LARGEST_WIDTH)]


def test_the_longest_source_is_the_same() -> None:
    (shift,) = constants("csrc", r"kLongest = int64_t\(1\) << (\d+);")
    assert 1 << int(shift) == ops.LONGEST


def test_few_queries_have_one_constant_in_the_cpu_kernels() -> None:
    assert constants("csrc/cpu", r"constexpr int64_t (kFew\w+) = \d+;") == ["kFewQueries"]
    assert not constants("csrc/cpu", r"\bp\.T (?:<=?|>=?) [2-9]\d*\b")
