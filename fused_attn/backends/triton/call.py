"""What forward and backward share: how arguments reach the kernels, workspaces, the launch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_attn.backends import triton as backend
from fused_attn.kernels import backward, concat, launch
from fused_attn.reference import MaskingFields, check_lengths, window_bounds


class Launch(NamedTuple):
    """One kernel launch, as `recording` keeps it."""

    kernel: Any
    programs: tuple[int]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


MOST_PROGRAMS = 2**31 - 1  # of a launch, in its first dimension; the others take 65535
_recorded: list[Launch] | None = None
_recorded_chip: launch.Chip | None = None


@contextmanager
def recording(chip: launch.Chip) -> Iterator[list[Launch]]:
    """Within it calls launch nothing, but tell what they would launch on such a chip.

    The ahead-of-time check calls the backend on meta tensors in here, so that what it compiles is
    what a GPU would run. For one thread.
    """
    global _recorded, _recorded_chip
    launches: list[Launch] = []
    _recorded, _recorded_chip = launches, chip
    try:
        yield launches
    finally:
        _recorded = _recorded_chip = None


def enqueue(kernel: Any, programs: tuple[int], arguments: tuple[Any, ...], **options: Any) -> None:
    """Launch a kernel on the current stream, unless there is nothing to do.

    ValueError if it would take more programs than a launch may have.
    """
    if programs[0] > MOST_PROGRAMS:
        raise ValueError(
            f"{kernel.__name__} would need {programs[0]} programs and a launch has at most "
            f"{MOST_PROGRAMS}: give the batch in parts"
        )
    # The default of fusing multiply and add is said to change after Triton 3.9.
    options["enable_fp_fusion"] = True
    if _recorded is not None:
        _recorded.append(Launch(kernel, programs, arguments, options))
    elif programs[0]:
        kernel[programs](*arguments, **options)


@cache
def _facts(device: torch.device) -> launch.Chip:
    if device.type != "cuda":  # interpreted; few multiprocessors, so that small problems are split
        return launch.Chip(multiprocessors=4, shared_memory=232448)
    facts: Any = torch.cuda.get_device_properties(device)
    is_nvidia = torch.version.hip is None
    shared = facts.shared_memory_per_block_optin if is_nvidia else facts.shared_memory_per_block
    return launch.Chip(facts.multi_processor_count, shared, is_nvidia)


def chip(device: torch.device) -> launch.Chip:
    return _recorded_chip or _facts(device)


class Masks(NamedTuple):
    """The masking as the kernels take it."""

    lengths: Tensor | None
    lengths_stride: int
    mask: Tensor | None
    strides: tuple[int, int, int]  # of the mask: b, t, s
    kind: int  # 0 no mask, 1 the same for all queries, 2 one for each
    keep: Tensor | None
    keep_scale: float
    bounds: Tensor | None = None  # int64 (B, T, 2), local attention
    centers: Tensor | None = None  # (B, T), with a Gaussian
    rate: float = 0.0  # 1 / sigma of that
    width: int = 0  # of a window, at most


def masks_of(masking: MaskingFields, source: int) -> Masks:
    lengths, mask, keep, keep_scale, window = masking
    kind, strides, bits = 0, (0, 0, 0), None
    if mask is not None:
        bits = (mask if mask.dim() == 3 else mask.unsqueeze(1)).view(torch.uint8)
        kind = 1 if bits.shape[1] == 1 else 2
        strides = (bits.stride(0), bits.stride(1) if kind == 2 else 0, bits.stride(2))
    kept = None if keep is None else keep.contiguous().view(torch.uint8)
    stride = 0 if lengths is None else lengths.stride(0)
    fields = (lengths, stride, bits, strides, kind, kept, keep_scale)
    if window is None:
        return Masks(*fields)
    centers, half_width, gaussian = window
    bounds = window_bounds(centers, half_width, source)
    width = min(int(2 * half_width) + 2, max(source, 1))  # one more, for edges that were rounded
    if not gaussian:
        return Masks(*fields, bounds, None, 0.0, width)
    return Masks(*fields, bounds, centers.contiguous(), 2.0 / half_width, width)


def unit(tensor: Tensor) -> Tensor:
    """The tensor with unit stride in its last dimension; the others may be anything."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


class Call:
    """What forward and backward share: sizes, the chip, precision and the masks."""

    def __init__(
        self,
        query: Tensor,
        memory: Tensor,
        masking: MaskingFields,
        score: str,
        others: tuple[Tensor | None, ...] = (),
    ) -> None:
        self.query, self.memory = unit(query), unit(memory)
        check_lengths(masking[0], memory)
        batch, queries, score_dim = query.shape
        _, source, memory_dim = memory.shape
        self.sizes = (batch, queries, source, memory_dim, score_dim)
        # Loads of 16 bytes need widths and strides that the compiler can see to be multiples.
        vector = 16 // memory.element_size()
        rows = (self.query, self.memory, *others)
        lengths = [length for x in rows if x is not None for length in x.stride()[:2]]
        is_aligned = not any(length % vector for length in (*lengths, memory_dim, score_dim))
        self.unit = {"UNIT": vector if is_aligned else 1}
        self.masks, self.score = masks_of(masking, source), score
        self.chip = chip(memory.device)
        self.is_wide = memory.dtype == torch.float32
        # Not allow_tf32: reading that raises once the newer setting has been used.
        tf32 = self.is_wide and torch.backends.cuda.matmul.fp32_precision == "tf32"
        self.precision = {
            "PRECISION": "tf32" if tf32 else "ieee",
            "WIDEN": backend.INTERPRETED and not self.is_wide,
        }
        self.kind = launch.Kind(self.is_wide, self.unit["UNIT"] > 1, self.masks.kind == 2)
        self.fast = {"FAST_RCP": self.chip.is_nvidia and not backend.INTERPRETED}

    def strides(self, *tensors: Tensor | None) -> list[int]:
        """Of the batch and the rows of each, in units; as the kernels take widths too."""
        unit = self.unit["UNIT"]
        pairs = ((0, 0) if x is None else x.stride()[:2] for x in tensors)
        return [stride // unit for pair in pairs for stride in pair]

    @property
    def widths(self) -> tuple[int, int]:
        """E and the width of the score, in units."""
        unit = self.unit["UNIT"]
        return self.sizes[3] // unit, self.sizes[4] // unit

    def floats(self, *shape: int) -> Tensor:
        return self.memory.new_empty(shape, dtype=torch.float32)

    def merge_sum(self, partial: Tensor, total: Tensor, splits: int, segment: int) -> None:
        batch, _, source, _, _ = self.sizes
        width = total[0].numel() if batch else 0
        masks = self.masks
        arguments = (partial, masks.lengths, total, masks.lengths_stride, width, source)
        programs = (batch * -(-width // 1024),)
        enqueue(backward.merge_sum, programs, (*arguments, splits, segment), BLOCK=1024)


class Factors(NamedTuple):
    """exp(2x) of both projections by columns, and each block's largest |x|; None for dot."""

    query: Tensor | None = None
    memory: Tensor | None = None
    query_peak: Tensor | None = None
    memory_peak: Tensor | None = None
    sizes: tuple[int, int, int] = (0, 0, 0)  # columns, and the padded numbers of rows

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.query, self.memory, self.query_peak, self.memory_peak


def factors_of(call: Call, memory_proj: Tensor, block_t: int, block_s: int) -> Factors:
    batch, queries, source, _, width = call.sizes
    even = width + width % 2
    padded = (-(-queries // block_t) * block_t, max(-(-source // block_s), 1) * block_s)
    masks, made = call.masks, []
    nothing = (None, 0, None, (0, 0, 0), 0)
    whole = (masks.lengths, masks.lengths_stride, masks.mask, masks.strides, masks.kind)
    for proj, rows, blocked, block, masking in (
        (call.query, queries, padded[0], block_t, nothing),
        (memory_proj, source, padded[1], block_s, whole),
    ):
        lengths, stride, mask, mask_strides, kind = masking
        exps, peaks = call.floats(batch, even, blocked), call.floats(batch, blocked // block)
        arguments = (proj, lengths, mask, exps, peaks, *call.strides(proj), stride, *mask_strides)
        sizes = (rows, queries, call.widths[1], even, blocked)
        tiles = {"MASK": kind, "BLOCK_R": block, "BLOCK_A": 32, **call.unit}
        programs = (batch * (blocked // block),)
        enqueue(concat.concat_exponentials, programs, (*arguments, *sizes), **tiles)
        made += [exps, peaks]
    return Factors(made[0], made[2], made[1], made[3], (even, *padded))
