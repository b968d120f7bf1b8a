"""Shared by forward and backward: arguments of the kernels, workspaces, the launch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_attn.backends.triton import interpreter
from fused_attn.backends.triton.launcher import Numbers, bound
from fused_attn.kernels import concat, gradients, launch, tiles
from fused_attn.reference import MaskingFields, check_lengths


class Launch(NamedTuple):
    """One kernel launch, as `recording` records it."""

    kernel: Any
    programs: tuple[int]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


MASK_NONE, MASK_SHARED = tiles.MASK_NONE.value, tiles.MASK_SHARED.value
MASK_PER_QUERY = tiles.MASK_PER_QUERY.value
WINDOW_NONE, WINDOW_HARD = tiles.WINDOW_NONE.value, tiles.WINDOW_HARD.value
WINDOW_GAUSSIAN = tiles.WINDOW_GAUSSIAN.value
PITCH = tiles.PITCH.value

MOST_PROGRAMS = 2**31 - 1  # of a launch, in its first dimension; the others take 65535
_recorded: list[Launch] | None = None
_recorded_chip: launch.Chip | None = None


@contextmanager
def recording(chip: launch.Chip) -> Iterator[list[Launch]]:
    """A context in which calls launch nothing, and record what they would launch on ``chip``.

    The ahead-of-time check calls the backend on meta tensors in here, so that it compiles what a
    GPU would run. Not thread-safe.
    """
    global _recorded, _recorded_chip
    launches: list[Launch] = []
    _recorded, _recorded_chip = launches, chip
    try:
        yield launches
    finally:
        _recorded = _recorded_chip = None


def enqueue(
    kernel: Any,
    programs: tuple[int],
    tensors: tuple[Tensor | None, ...],
    numbers: Numbers,
    **options: Any,
) -> None:
    """Launch a kernel on the current stream, unless there is nothing to do.

    ValueError if it would take more programs than a launch may have.
    """
    if programs[0] > MOST_PROGRAMS:
        raise ValueError(
            f"{kernel.__name__} would need {programs[0]} programs and a launch has at most "
            f"{MOST_PROGRAMS}: split the batch"
        )
    # Triton 3.9 warns that the default of fusing multiply and add will change.
    options["enable_fp_fusion"] = True
    if _recorded is not None:
        _recorded.append(Launch(kernel, programs, (*tensors, *numbers), options))
    elif programs[0]:
        bound(kernel, options)(programs, tensors, numbers)


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
    mask_kind: int  # MASK_NONE, MASK_SHARED or MASK_PER_QUERY
    keep: Tensor | None
    keep_scale: float
    window: int = WINDOW_NONE  # or WINDOW_HARD, WINDOW_GAUSSIAN
    centers: Tensor | None = None  # float32 (B, T)
    half_width: float = 0.0
    rate: float = 0.0  # 1 / sigma of the Gaussian
    width: int = 0  # the largest possible number of positions in a window

    @property
    def mask_per_query(self) -> bool:
        return self.mask_kind == MASK_PER_QUERY


def masks_of(masking: MaskingFields, source: int) -> Masks:
    lengths, mask, keep, keep_scale, window = masking
    mask_kind, strides, bits = MASK_NONE, (0, 0, 0), None
    if mask is not None:
        bits = (mask if mask.dim() == 3 else mask.unsqueeze(1)).view(torch.uint8)
        is_shared = bits.shape[1] == 1
        mask_kind = MASK_SHARED if is_shared else MASK_PER_QUERY
        strides = (bits.stride(0), 0 if is_shared else bits.stride(1), bits.stride(2))
    kept = None if keep is None else keep.contiguous().view(torch.uint8)
    stride = 0 if lengths is None else lengths.stride(0)
    fields = (lengths, stride, bits, strides, mask_kind, kept, keep_scale)
    if window is None:
        return Masks(*fields)
    centers, half_width, gaussian = window
    width = min(int(2 * half_width) + 2, max(source, 1))  # one more, for edges that were rounded
    rate = 2.0 / half_width if gaussian else 0.0
    window_kind = WINDOW_GAUSSIAN if gaussian else WINDOW_HARD
    return Masks(*fields, window_kind, centers.contiguous(), float(half_width), rate, width)


def pitch(source: int) -> int:
    """Row length of a workspace (B, T, S), in units of PITCH: padded for loads of 16 bytes."""
    return -(-source // PITCH)


def unit(tensor: Tensor) -> Tensor:
    """The tensor with unit stride in its last dimension; its other strides are arbitrary."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


_UNITS = {vector: {"UNIT": vector} for vector in (1, 4, 8)}


@cache
def _options(
    is_float32: bool, tf32: bool, is_nvidia: bool
) -> tuple[dict[str, Any], dict[str, bool]]:
    """Kernel constants for matrix products, and for reciprocals."""
    interpreted = interpreter.INTERPRETED
    precision = {"PRECISION": "tf32" if tf32 else "ieee", "WIDEN": interpreted and not is_float32}
    return precision, {"FAST_RCP": is_nvidia and not interpreted}


class Call:
    """Shared by forward and backward: sizes, the chip, precision and the masks."""

    def __init__(
        self,
        query: Tensor,
        memory: Tensor,
        masking: MaskingFields,
        score: str,
        others: tuple[Tensor | None, ...] = (),
    ) -> None:
        self.query, self.memory = query, memory = unit(query), unit(memory)
        check_lengths(masking[0], memory)
        batch, queries, score_dim = query.shape
        _, source, memory_dim = memory.shape
        self.sizes = (batch, queries, source, memory_dim, score_dim)
        is_float32 = memory.dtype == torch.float32
        # Loads of 16 bytes need widths and strides that the compiler knows to be multiples of that.
        vector = 4 if is_float32 else 8
        bits = memory_dim | score_dim
        for rows in (query, memory, *others):
            if rows is not None:
                steps = rows.stride()
                bits |= steps[0] | steps[1]
        self.vector = 1 if bits & (vector - 1) else vector
        self.unit = _UNITS[self.vector]
        self.masks, self.score = masks_of(masking, source), score
        self.chip = chip(memory.device)
        # Not allow_tf32: reading that raises once the newer setting has been used.
        tf32 = is_float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
        self.precision, self.fast = _options(is_float32, tf32, self.chip.is_nvidia)
        masks = self.masks
        has_dropout = masks.keep is not None
        self.kind = launch.Kind(is_float32, self.vector > 1, masks.mask_per_query, has_dropout)

    def strides(self, *tensors: Tensor | None) -> list[int]:
        """Strides of the batch and of the rows of each, in units of UNIT elements."""
        vector = self.vector
        found: list[int] = []
        for x in tensors:
            steps = (0, 0) if x is None else x.stride()
            found += (steps[0] // vector, steps[1] // vector)
        return found

    @property
    def widths(self) -> tuple[int, int]:
        """E and the width of the score, in units of UNIT elements."""
        return self.sizes[3] // self.vector, self.sizes[4] // self.vector

    def floats(self, *shape: int) -> Tensor:
        return self.memory.new_empty(shape, dtype=torch.float32)

    def merge(self, sums: Sums) -> None:
        """The last launch of a backward pass whose memory needs no gradient."""
        tensors, numbers, programs = sums.arguments(self.sizes[0])
        masks = self.masks
        tensors = (masks.lengths, *tensors)
        numbers = (masks.lengths_stride, self.sizes[2], *numbers)
        enqueue(gradients.merge_alone, (programs,), tensors, numbers)


class Sums(NamedTuple):
    """Operands of `merge_sums`: splits (B, splits, ...) of a gradient, and parts of grad_v."""

    partial: Tensor | None
    total: Tensor | None
    splits: int = 1
    segment: int = 1
    partial_v: Tensor | None = None
    grad_v: Tensor | None = None

    def arguments(self, batch: int) -> tuple[tuple[Tensor | None, ...], Numbers, int]:
        """Tensors and numbers as the kernels take them, and the number of programs."""
        merged = self.total.numel() // batch if self.total is not None and batch else 0
        merges = batch * -(-merged // gradients.MERGED.value)
        rows, width = (0, 0) if self.partial_v is None else self.partial_v.shape
        programs = merges + -(-width // gradients.MERGED_V.value)
        tensors = (self.partial, self.total, self.partial_v, self.grad_v)
        return tensors, (merges, merged, self.splits, self.segment, rows, width), programs


NOTHING = Sums(None, None)


class Factors(NamedTuple):
    """exp(2x) of both projections by columns, and the peaks of their rows; None for dot.

    See `concat_exponentials`.
    """

    query: Tensor | None = None
    memory: Tensor | None = None
    query_peak: Tensor | None = None
    memory_peak: Tensor | None = None
    sizes: tuple[int, int, int] = (0, 0, 0)  # columns, and the padded rows in units

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.query, self.memory, self.query_peak, self.memory_peak


def factors_of(call: Call, memory_proj: Tensor, block_t: int, block_s: int) -> Factors:
    batch, queries, source, _, width = call.sizes
    even = -(-width // concat.EXP_COLUMNS.value) * concat.EXP_COLUMNS.value
    unit, masks = concat.EXP_ROWS.value, call.masks
    padded = (-(-queries // block_t) * block_t, max(-(-source // block_s), 1) * block_s)
    units = (padded[0] // unit, padded[1] // unit)
    exps = [call.floats(batch, even, rows) for rows in padded]
    peaks = [call.floats(batch, rows) for rows in units]
    block = 64
    programs = batch * (-(-padded[0] // block) + -(-padded[1] // block))
    enqueue(
        concat.concat_exponentials,
        (programs,),
        (call.query, memory_proj, masks.lengths, masks.mask, *exps, *peaks),
        (
            *(*call.strides(call.query, memory_proj), masks.lengths_stride, *masks.strides),
            *(queries, source, call.widths[1], even, *units),
        ),
        MASK=masks.mask_kind,
        BLOCK_R=block,
        BLOCK_A=32,
        **call.unit,
    )
    return Factors(exps[0], exps[1], peaks[0], peaks[1], (even, *units))
