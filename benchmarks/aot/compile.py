"""Compile what the Triton backend would launch, for absent GPUs, and read the result.

The backend itself is called on meta tensors, so what is compiled is what a GPU would run: the same
plan of the launch table, the same specialisation on strides and sizes.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from fused_attn.kernels.concat import EXP_COLUMNS, OTHER_ROWS
from fused_attn.kernels.launch import Chip
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.common.chips import H100
from fused_attn.backends.triton import backward, call, forward

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Gpu:
    """A target of the compiler, and the chip that the launch table plans for."""

    name: str
    target: GPUTarget
    chip: Chip


# One chip of each: A100, RTX 4090, H100 and H200, RTX 5090, MI300X.
GPUS = {
    "sm_80": Gpu("sm_80", GPUTarget("cuda", 80, 32), Chip(108, 166912)),
    "sm_89": Gpu("sm_89", GPUTarget("cuda", 89, 32), Chip(128, 101376)),
    "sm_90": Gpu("sm_90", GPUTarget("cuda", 90, 32), H100),
    "sm_120": Gpu("sm_120", GPUTarget("cuda", 120, 32), Chip(170, 101376)),
    "gfx942": Gpu("gfx942", GPUTarget("hip", "gfx942", 64), Chip(304, 65536, False)),
}
# Kernels that compute a tile of concat scores, two columns per reciprocal.
SCORED = ("rows_backward", "score_rows", "concat_scores_only")


@dataclass(frozen=True)
class Case:
    """A call of the public operators, forward and backward."""

    score: str  # "dot", "concat", or "scores": concat without a softmax
    dtype: torch.dtype
    queries: int
    source: int
    width: int
    batch: int = 64
    flags: str = ""  # of "lengths", "mask", "cube", "keep", "weights", "window", "frozen"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"B{self.batch} T{self.queries} S{self.source} D{self.width}"
        return " ".join(filter(None, (self.score, dtype, sizes, self.flags)))


def _masking(case: Case) -> tuple[Any, ...]:
    shape = (case.batch, case.queries, case.source)
    lengths = mask = keep = None
    if "lengths" in case.flags:
        lengths = torch.empty(case.batch, dtype=torch.int64, device="meta")
    if "mask" in case.flags:
        mask = torch.empty(case.batch, case.source, dtype=torch.bool, device="meta")
    if "cube" in case.flags:
        mask = torch.empty(shape, dtype=torch.bool, device="meta")
    if "keep" in case.flags:
        keep = torch.empty(shape, dtype=torch.bool, device="meta")
    window = None
    if "window" in case.flags:
        window = (torch.empty(case.batch, case.queries, device="meta"), 10.0, True)
    return lengths, mask, keep, 1.0 if keep is None else 1.25, window


def launches(case: Case, chip: Chip) -> tuple[list[call.Launch], list[call.Launch]]:
    """What the forward and the backward of ``case`` launch."""

    def empty(*shape: int, dtype: torch.dtype = case.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    batch, queries, source, width = case.batch, case.queries, case.source, case.width
    query, memory = empty(batch, queries, width), empty(batch, source, width)
    weights = empty(batch, queries, source) if "weights" in case.flags else None
    saved = (empty(batch, queries, width), weights, empty(batch, queries, dtype=torch.float32))
    grads, masking = (empty(batch, queries, width), weights), _masking(case)
    wanted = (weights is not None, True)
    # A frozen memory needs no gradient.
    gradients = [i == 0 or "frozen" not in case.flags for i in range(5)]
    with call.recording(chip) as forwards:
        if case.score == "scores":
            forward.concat_scores(query, memory, empty(width), masking)
        elif case.score == "dot":
            forward.dot(query, memory, 1.0, masking, *wanted)
        else:
            exps = empty(*memory.shape) if queries == 1 else None
            inputs = (query, memory, exps, empty(width), memory)
            forward.concat(*inputs, masking, *wanted)
    with call.recording(chip) as backwards:
        if case.score == "scores":
            seed = empty(batch, queries, source, dtype=torch.float32)
            backward.concat_scores(seed, query, memory, empty(width), masking, gradients[:3])
        elif case.score == "dot":
            backward.dot(*grads, query, memory, 1.0, masking, saved, gradients[:3])
        else:
            operands = (query, memory, empty(width), memory)
            backward.concat(*grads, *operands, masking, saved, gradients)
    return forwards, backwards


def source_of(launch: call.Launch) -> tuple[ASTSource, dict[str, Any]]:
    """The kernel with its arguments' types, specialised as in a call, and its options.

    For a number that the kernel is not specialised on, only its type matters, 32 or 64 bits.
    """
    names = launch.kernel.arg_names
    given = {**dict(zip(names, launch.arguments, strict=False))}
    given |= {name: value for name, value in launch.options.items() if name in names}
    options = {name: value for name, value in launch.options.items() if name not in names}
    constant = {p.name for p in launch.kernel.params if p.is_constexpr}
    plain = {p.name for p in launch.kernel.params if p.do_not_specialize}
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(names):
        value = given[name]
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name in constant or value is None or (value == 1 and name not in plain):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and name not in plain:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes), options


def loop_elements(launch: call.Launch) -> tuple[float, ...]:
    """Terms of the concat score that a thread computes per iteration of each paired loop.

    In the order of the kernel's source; empty if the kernel has no such loop.
    """
    name, options = launch.kernel.__name__, launch.options
    block_t, block_s, block_a = (options.get(f"BLOCK_{size}", 0) for size in "TSA")
    threads = 32 * options.get("num_warps", 4)
    if name == "concat_gradients":
        given = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
        owned = [block_s] if given["grad_query_proj"] is None else [block_t, block_s]
        return tuple(OTHER_ROWS.value * rows * block_a / threads for rows in owned)
    if name in SCORED and options.get("CONCAT", True):
        return (EXP_COLUMNS.value * block_t * block_s / threads,)
    return ()


class Loop(NamedTuple):
    """One iteration, as a thread runs it."""

    reciprocals: int
    instructions: int


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled."""

    kernel: str
    tiles: dict[str, int]
    num_warps: int
    num_stages: int
    registers: int  # of a thread
    spills: int  # bytes of stack of a thread
    shared: int  # bytes
    matrix: str  # "wgmma", "mma", "mfma" or ""
    wide_loads: int  # of 16 bytes, from global memory
    narrow_loads: int
    loops: tuple[Loop, ...] = ()  # the paired ones of concat, NVIDIA only


def compile_for(launch: call.Launch, gpu: Gpu) -> Compiled:
    source, options = source_of(launch)
    kernel = triton.compile(source, target=gpu.target, options=options)
    flags = ("MASK", "UNIT", "CONCAT", "SPLIT")
    tiles = {k: v for k, v in launch.options.items() if k.startswith("BLOCK") or k in flags}
    read = _read_hip if gpu.target.backend == "hip" else _read_cuda
    return Compiled(
        launch.kernel.__name__,
        {name: int(value) for name, value in tiles.items()},
        kernel.metadata.num_warps,
        options.get("num_stages", 3),
        shared=kernel.metadata.shared,
        **read(kernel),
    )


def _tool(name: str, *arguments: str | Path) -> str:
    command = [TOOLS / name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def loops(sass: str) -> Iterator[Counter[str]]:
    """The instructions of each loop (enclosed by a backward branch), counted by first word."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?(.*?);", sass)
    code = [(int(address, 16), text) for address, text in lines]
    for address, text in code:
        target = re.match(r"BRA\S* .*?0x([0-9a-f]+)", text)
        if target and (start := int(target[1], 16)) < address:
            yield Counter(t.split()[0] for at, t in code if start <= at <= address)


def paired_loops(sass: str) -> tuple[Loop, ...]:
    """The concat loops of the usual range: more reciprocals than exponentials."""
    found = [c for c in loops(sass) if c["MUFU.RCP"] > c["MUFU.EX2"]]
    return tuple(Loop(c["MUFU.RCP"], sum(c.values())) for c in found)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the tools' output has nothing like {pattern!r}")
    return int(found[1])


def _read_cuda(kernel: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("cuobjdump", "-sass", file.name)
    loads = re.findall(r"\b(?:LDG|LDGSTS)\.E[\w.]*", sass)
    wide = sum(".128" in load for load in loads)
    return {
        "registers": _number(r"REG:(\d+)", usage),
        "spills": _number(r"STACK:(\d+)", usage),
        "matrix": "wgmma" if "HGMMA" in sass else "mma" if "HMMA" in sass else "",
        "wide_loads": wide,
        "narrow_loads": len(loads) - wide,
        "loops": paired_loops(sass),
    }


def _read_hip(kernel: Any) -> dict[str, Any]:
    text = kernel.asm["amdgcn"]
    loads = re.findall(r"(?:global|buffer)_load_\w+", text)
    wide = sum("dwordx4" in load for load in loads)
    return {
        "registers": _number(r"\.vgpr_count:\s+(\d+)", text),
        "spills": _number(r"\.vgpr_spill_count:\s+(\d+)", text) * 4,
        "matrix": "mfma" if "v_mfma" in text else "",
        "wide_loads": wide,
        "narrow_loads": len(loads) - wide,
    }
