"""Runs the kernels of csrc/cuda without a GPU: compiled by the host compiler, on CPU tensors.

tests/native/cuda_on_host.h describes how the GPU is emulated, and which errors that detects.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from ctypes import POINTER, Structure, c_bool, c_double, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fused_attn.reference import Masking

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tests/native/cuda_on_host.cpp"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}


class Rows(Structure):
    _fields_ = [
        ("data", c_void_p), ("batch_stride", c_int64), ("row_stride", c_int64),
        ("starts", c_void_p),
    ]  # fmt: skip


class Params(Structure):
    """AttentionParams of csrc/attention_params.h."""

    _fields_ = [
        ("score", c_int32), ("dtype", c_int32), ("exp_dtype", c_int32),
        *((name, c_int64) for name in "BTSEK"), ("scale", c_double), ("threads", c_int),
        ("query", Rows), ("memory", Rows), ("memory_proj", Rows), ("memory_exp", Rows),
        ("v", c_void_p), ("lengths", c_void_p), ("mask", c_void_p),
        ("mask_b", c_int64), ("mask_t", c_int64), ("mask_s", c_int64),
        ("keep", c_void_p), ("keep_scale", c_double),
        ("bounds", c_void_p), ("centers", c_void_p), ("rate", c_double),
        ("context", c_void_p), ("weights", c_void_p), ("logsumexp", c_void_p),
        ("scores_only", c_bool),
        ("raw_scores", c_void_p), ("raw_grad_scores", c_void_p),
        ("device", c_int), ("stream", c_void_p), ("device_lengths", c_void_p),
        ("length_stride", c_int64), ("length_bytes", c_int), ("lengths_are_signed", c_bool),
        ("workspace", c_void_p),
        ("grad_context", Rows), ("grad_weights", Rows), ("grad_query", c_void_p),
        ("grad_memory", c_void_p), ("grad_memory_proj", c_void_p), ("grad_v", c_void_p),
        ("grad_centers", c_void_p),
    ]  # fmt: skip


class Plan(NamedTuple):
    elements: int
    queries: int
    rows: int
    warps: int
    query_tiles: int
    splits: int
    shared_floats: int


@cache
def library(directory: Path) -> ctypes.CDLL:
    """The kernels as a shared library, compiled into ``directory``."""
    out = directory / "cuda_on_host.so"
    # _FORTIFY_SOURCE would mistake the jumps between stacks for an attack.
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra"]
    flags += ["-Werror", "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc'}"]
    done = subprocess.run(
        [COMPILER, *flags, SOURCE, "-o", out], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(out))
    for name in ("size_of_params", "take_counters"):
        getattr(loaded, name).restype = ctypes.c_size_t if name == "size_of_params" else c_int64
    for name in ("guarded_alloc", "guarded_data", "new_counters"):
        getattr(loaded, name).restype = c_void_p
    loaded.run_call.restype = ctypes.c_char_p
    loaded.run_call.argtypes = (POINTER(Params), c_int, c_int, ctypes.c_uint64)
    loaded.guarded_alloc.argtypes = (ctypes.c_size_t,)
    for name in ("guarded_data", "guarded_free", "delete_counters"):
        getattr(loaded, name).argtypes = (c_void_p,)
    loaded.take_counters.argtypes = (c_void_p, ctypes.c_uint64, c_bool, c_int64)
    assert loaded.size_of_params() == ctypes.sizeof(Params)
    return loaded


@dataclass
class Call:
    """One call of the kernels. It keeps the memory of its operands alive."""

    library: ctypes.CDLL
    multiprocessors: int = 1  # of the GPU that the call is planned for
    splits: int = 0  # of each row's positions; 0: as planned
    seed: int = 0  # for the order in which blocks and threads run
    guarded: bool = False  # inputs end at a page that must not be accessed
    kept: list[object] = field(default_factory=list)

    def place(self, tensor: Tensor | None) -> Tensor | None:
        """Return the same values with the same strides, in guarded memory if ``guarded``."""
        if tensor is None or not self.guarded or not tensor.numel():
            return tensor
        strides = zip(tensor.shape, tensor.stride(), strict=True)
        elements = 1 + sum((size - 1) * stride for size, stride in strides)
        flat = self.memory(elements * tensor.element_size()).view(tensor.dtype)
        flat.copy_(tensor.as_strided((elements,), (1,)))  # and what lies between
        return flat.as_strided(tensor.shape, tensor.stride())

    def memory(self, count: int) -> Tensor:
        """``count`` bytes before a page that must not be accessed, as uint8."""
        guarded = self.library.guarded_alloc(count)
        self.kept.append(guarded)
        rounded = (count + 15) // 16 * 16
        at = self.library.guarded_data(guarded) + rounded - count
        return torch.frombuffer((ctypes.c_uint8 * count).from_address(at), dtype=torch.uint8)

    def __del__(self) -> None:
        for guarded in self.kept:
            self.library.guarded_free(guarded)

    def params(
        self,
        operands: dict[str, Tensor],
        scale: float,
        masking: Masking,
        outputs: tuple[Tensor, Tensor | None, Tensor | None],
    ) -> Params:
        """``operands`` are query, memory and for concat also memory_proj, memory_exp and v."""
        p, memory, query = Params(), operands["memory"], operands["query"]
        p.score, p.dtype = int("v" in operands), DTYPES[memory.dtype]
        p.B, p.S, p.E = memory.shape
        p.T, p.K = query.shape[1:]
        p.scale, p.keep_scale = scale, masking.keep_scale
        p.exp_dtype = DTYPES[operands["memory_exp"].dtype] if "v" in operands else 0
        for name, tensor in operands.items():
            assert tensor.shape[-1] == 1 or tensor.stride(-1) == 1
            strides = tensor.stride()
            rows = tensor.data_ptr() if name == "v" else Rows(tensor.data_ptr(), *strides[:2])
            setattr(p, name, rows)
        if (lengths := masking.memory_lengths) is not None:
            p.device_lengths, p.length_stride = lengths.data_ptr(), lengths.stride(0)
            p.length_bytes, p.lengths_are_signed = lengths.element_size(), lengths.dtype.is_signed
        if (mask := masking.memory_mask) is not None:
            p.mask, p.mask_b, p.mask_s = mask.data_ptr(), mask.stride(0), mask.stride(-1)
            p.mask_t = mask.stride(1) if mask.dim() == 3 and mask.shape[1] > 1 else 0
        if masking.keep_mask is not None:
            p.keep = masking.keep_mask.data_ptr()
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in outputs]
        p.context, p.weights, p.logsumexp = addresses
        return p

    def plan(self, p: Params) -> Plan:
        fields = (c_int64 * len(Plan._fields))()
        self.library.plan_call(ctypes.byref(p), self.multiprocessors, fields)
        return Plan(*fields)

    def run(
        self,
        operands: dict[str, Tensor],
        scale: float,
        masking: Masking,
        return_weights: bool = True,
        return_logsumexp: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Run the call. Returns (context, weights, logsumexp), NaN where nothing was written."""
        operands = {name: self.place(tensor) for name, tensor in operands.items()}
        keep = None if masking.keep_mask is None else masking.keep_mask.contiguous()
        masks = (masking.memory_lengths, masking.memory_mask, keep)
        masking = Masking(*map(self.place, masks), masking.keep_scale)
        (batch, source, width), queries = operands["memory"].shape, operands["query"].shape[1]

        def empty(*shape: int, dtype: torch.dtype = operands["memory"].dtype) -> Tensor:
            return self.place(torch.full(shape, torch.nan, dtype=dtype))

        context = empty(batch, queries, width)
        weights = empty(batch, queries, source) if return_weights else None
        logsumexp = empty(batch, queries, dtype=torch.float32) if return_logsumexp else None
        outputs = (context, weights, logsumexp)
        p = self.params(operands, scale, masking, outputs)
        failure = self.library.run_call(
            ctypes.byref(p), self.multiprocessors, self.splits, self.seed
        )
        assert failure is None, failure.decode()
        return tuple(None if tensor is None else tensor.clone() for tensor in outputs)
