"""What is measured on a GPU: scores, shapes and dtypes, the most telling first."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.common.calls import Attend, Results
from benchmarks.common.problems import Row, Sizes, short_dtype_name
from benchmarks.common.sides import EAGER, fused, one_head, sdpa
from fused_attn import testing
from fused_attn.reference import LocalWindow, Masking
from fused_attn.testing import Inputs, Tensors

COMPILERS = ("compile", "flex")  # rivals that take long to start
STEPS = 8  # queries that a decoding step has at most


@dataclass(frozen=True)
class GpuRow(Row):
    """One call. D = E = A. Concat arrives projected, and prepared where it is a decoding step.

    ``cold`` inputs are read from memory; others may lie in the L2 cache.
    """

    dtype: torch.dtype = torch.bfloat16
    cold: bool = True
    backends: tuple[str, ...] = ("triton",)
    with_compilers: bool = False  # also against torch.compile and flex_attention

    def __post_init__(self) -> None:
        # It follows from score and sizes, also where `dataclasses.replace` changes those.
        is_step = self.score == "projected" and self.queries <= STEPS
        object.__setattr__(self, "prepared", is_step)

    def __str__(self) -> str:
        sizes = ",".join(map(str, self.sizes))
        passes = "fwd+bwd" if self.backward else "fwd"
        words = [self.formula, short_dtype_name(self.dtype), f"({sizes})", passes]
        words += [] if self.cold else ["hot"]
        words += [name for name in ("lengths", "weights") if getattr(self, name)]
        words += [] if self.window is None else [f"window {self.window}"]
        return " ".join(words)

    @property
    def read(self) -> float:
        """About the share of the memory that a call must read."""
        if self.window is not None:
            return min(1.0, self.queries * (2 * self.window + 1) / self.source)
        return (self.source + 1) / (2 * self.source) if self.lengths else 1.0

    def sides(self) -> list[str]:
        """Our backends, then the rivals, those that compile last."""
        found = [*self.backends, EAGER]
        if self.score == "dot" and not self.weights:
            found.append("sdpa")
        if self.with_compilers:
            found += [name for name in COMPILERS if name == "compile" or "sdpa" in found]
        return found


def all_rows() -> list[GpuRow]:
    """Every row of the stage "kernels", in its order."""
    both, f32, f16 = ("triton", "cuda"), torch.float32, torch.float16
    decode = [Sizes(64, 1, 1024, 512), Sizes(32, 1, 512, 512), Sizes(64, 1, 1024, 1024),
              Sizes(128, 1, 8192, 512), Sizes(8, 1, 200, 512)]  # fmt: skip
    training = [Sizes(64, 64, 1024, 512), Sizes(64, 64, 1024, 1024), Sizes(64, 50, 50, 512),
                Sizes(128, 10, 128, 1024), Sizes(64, 64, 512, 512)]  # fmt: skip
    found = [GpuRow("dot", sizes, backends=both) for sizes in decode]
    for backward in (False, True):
        found += [GpuRow("dot", sizes, backward=backward) for sizes in training]
    found += [GpuRow("projected", training[0], backward=backward) for backward in (False, True)]
    found += [GpuRow("projected", sizes, backends=both) for sizes in decode]
    found += [GpuRow("dot", sizes, cold=False, backends=both) for sizes in decode]
    for backward in (False, True):
        found += [GpuRow("projected", sizes, backward=backward) for sizes in training[1:]]
        found += [GpuRow("general", sizes, backward=backward) for sizes in training]
        found += [GpuRow("dot", training[0], dtype, backward=backward) for dtype in (f32, f16)]
    found += [GpuRow("projected", Sizes(1280, 1, 66, 1024), backends=both)]
    found += [GpuRow("projected", decode[0], cold=False, backends=both)]
    found += _more(both)
    compiled = (found[0], found[5], found[10], found[15])
    return [replace(row, with_compilers=row in compiled) for row in found]


def _more(both: tuple[str, ...]) -> list[GpuRow]:
    """Beams, lengths, weights and windows."""
    found = []
    for width in (512, 1024):
        beams = [Sizes(64, queries, 1024, width) for queries in (2, 4, 5, 8)]
        found += [GpuRow("dot", sizes, backends=both) for sizes in beams]
        found += [GpuRow("projected", Sizes(64, 5, 1024, width), backends=both)]
    step, training = Sizes(64, 1, 1024, 512), Sizes(64, 64, 1024, 512)
    for sizes in (step, training):
        backends = both if sizes is step else ("triton",)
        for score in ("dot", "projected"):
            found.append(GpuRow(score, sizes, backends=backends, lengths=True))
            found.append(GpuRow(score, sizes, backends=backends, weights=True))
            if sizes is training:
                found.append(GpuRow(score, sizes, backward=True, lengths=True))
    found += [GpuRow("dot", sizes, window=32) for sizes in (step, training)]
    found += [GpuRow("dot", training, window=32, backward=True)]
    rest = (Sizes(32, 40, 200, 512), Sizes(16, 30, 300, 1000))
    return [*found, *(GpuRow("dot", sizes) for sizes in rest)]


def inputs_of(row: GpuRow, device: str, seed: int = 0) -> Inputs:
    """Random inputs on the device, so that scores have a spread of about 2 at every width."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, size: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        return (size * values).to(row.dtype)

    batch, queries, source, width = row.sizes
    tensors = {"memory": draw(batch, source, width)}
    if row.score == "projected":
        tensors["query_proj"] = draw(batch, queries, width)
        tensors["memory_proj"] = draw(batch, source, width)
        tensors["v"] = draw(width, size=2 * width**-0.5)
    else:
        tensors["query"] = draw(batch, queries, width, size=2 * width**-0.5)
    if row.score == "general":
        tensors["query"] = draw(batch, queries, width)
        tensors["weight"] = draw(width, width, size=2 / width)
    grad_context = draw(batch, queries, width)
    grad_weights = draw(batch, queries, source) if row.weights else None
    lengths, window = None, None
    if row.lengths:
        lengths = torch.randint(1, source + 1, (batch,), generator=generator, device=device)
    if row.window is not None:
        centers = torch.rand(batch, queries, generator=generator, device=device) * source
        window = LocalWindow(centers.round(), float(row.window), False)
    masking = Masking(lengths, None, None, 1.0, window)
    return Inputs(row.score, tensors, masking, 1.0, grad_context, grad_weights)


def plain(row: GpuRow, counts: Tensor | None) -> Attend:
    """What people write: bmm, softmax, bmm, and a mask only where some positions do not count."""

    def attend(tensors: Tensors) -> Results:
        context, weights = testing.plain_attention(row.score, tensors, 1.0, counts, Masking())
        return context, weights if row.weights else None

    return attend


def side(row: GpuRow, name: str, inputs: Inputs) -> Attend:
    """One of `GpuRow.sides`: a backend of ours, or a rival."""
    if name in row.backends:
        return fused(row, inputs, name)
    # The mask is made once for a batch and is not part of the call.
    counts = testing.counted(inputs) if row.lengths or row.window is not None else None
    if name == EAGER:
        return plain(row, counts)
    if name == "compile":
        return torch.compile(plain(row, counts), dynamic=False)
    if name == "sdpa":
        return sdpa(row, counts)
    from torch.nn.attention.flex_attention import flex_attention

    return one_head(row, torch.compile(flex_attention, dynamic=False))
