"""The Triton kernels compiled for GPUs that are not here, and the promises they are held to."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import benchmarks_package
import pytest
import torch

from fused_attn import backends

triton = backends.load("triton")
absent = [reason for reason in triton.unavailable_reasons() if "triton" in reason]
pytestmark = pytest.mark.skipif(bool(absent), reason="; ".join(absent))


def compile_all(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m benchmarks aot`, in a process where kernels are compiled and not interpreted."""
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONSAFEPATH")}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", "aot", *arguments],
        cwd=benchmarks_package.ROOT,
        env=kept | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("gpu", ["sm_90", "sm_120", "gfx942"])
def test_kernels_compile_and_keep_their_promises(gpu: str) -> None:
    done = compile_all("--quick", "--gpu", gpu)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{gpu}, triton ") and line.endswith(", 0 with a broken promise")


def test_bad_arguments_are_named() -> None:
    names = "sm_80, sm_89, sm_90, sm_120, gfx942"
    assert f"--gpu must be one of {names}, got sm_1" in compile_all("--gpu=sm_1").stderr
    interpreted = compile_all(TRITON_INTERPRET="1")
    assert interpreted.returncode == 2
    assert "unset TRITON_INTERPRET" in interpreted.stderr


@pytest.fixture(scope="module")
def modules() -> Iterator[SimpleNamespace]:
    with benchmarks_package.imported() as found:
        yield found


@pytest.fixture(scope="module")
def sound(modules: SimpleNamespace) -> tuple[object, object, object]:
    """What a kernel that keeps its promises looks like: (result, launch, GPU)."""
    aot_compile = modules.aot.compile
    case = aot_compile.Case("dot", torch.bfloat16, 64, 1024, 512)
    gpu = aot_compile.GPUS["sm_90"]
    forwards, _ = aot_compile.launches(case, gpu.chip)
    launch = next(one for one in forwards if one.options.get("BLOCK_T") == 64)
    result = aot_compile.Compiled(
        kernel="online_forward",
        tiles={"BLOCK_T": 64, "BLOCK_S": 32, "BLOCK_E": 512, "UNIT": 8},
        num_warps=8,
        num_stages=3,
        registers=255,
        spills=8,
        shared=160_000,
        matrix="wgmma",
        wide_loads=40,
        narrow_loads=1,
    )
    return result, launch, gpu


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"spills": 65}, "65 bytes of stack, at most 64 expected"),
        ({"shared": 232449}, "232449 bytes of shared memory, the chip has 232448"),
        ({"matrix": "mma"}, "64 rows and no WGMMA"),
        ({"matrix": ""}, "no matrix instruction"),
        ({"wide_loads": 0}, "no load of 16 bytes"),
    ],
    ids=str,
)
def test_a_broken_promise_is_seen(
    change: dict[str, object],
    reason: str | None,
    sound: tuple[object, object, object],
    modules: SimpleNamespace,
) -> None:
    result, launch, gpu = sound
    broken = modules.aot.promises.promises(replace(result, **change), launch, gpu)
    assert broken == ([] if reason is None else [reason])


def launched(modules: SimpleNamespace, score: str, kernel: str) -> tuple[object, object]:
    """(launch of that kernel in a call of 64 queries and 1000 columns, GPU)."""
    aot_compile = modules.aot.compile
    gpu = aot_compile.GPUS["sm_90"]
    case = aot_compile.Case(score, torch.bfloat16, 64, 1024, 1000)
    both = itertools.chain(*aot_compile.launches(case, gpu.chip))
    return next(one for one in both if one.kernel.__name__ == kernel), gpu


@pytest.mark.parametrize("kernel", ["score_rows", "context_columns"])
def test_a_product_by_rows_or_columns_takes_matrix_instructions(
    kernel: str, sound: tuple[object, object, object], modules: SimpleNamespace
) -> None:
    launch, gpu = launched(modules, "dot", kernel)
    tiles = {"BLOCK_T": 64, "UNIT": 8, "CONCAT": 0}
    result = replace(sound[0], kernel=kernel, tiles=tiles)
    assert modules.aot.promises.promises(result, launch, gpu) == []
    plain = replace(result, matrix="")
    assert modules.aot.promises.promises(plain, launch, gpu) == ["no matrix instruction"]
    few = replace(result, tiles=tiles | {"BLOCK_T": 32}, matrix="mma")
    assert modules.aot.promises.promises(few, launch, gpu) == []


def test_half_a_reciprocal_is_counted(
    sound: tuple[object, object, object], modules: SimpleNamespace
) -> None:
    """32 x 64 scores on 128 threads are 16 a thread, and 8 columns an iteration: 128 terms."""
    loop = modules.aot.compile.Loop
    launch, gpu = launched(modules, "concat", "score_rows")
    options = launch.options | {"BLOCK_T": 32, "BLOCK_S": 64, "num_warps": 4}
    launch = launch._replace(options=options)
    assert modules.aot.compile.loop_elements(launch) == (128,)
    tiles = {"BLOCK_T": 32, "BLOCK_S": 64, "CONCAT": 1, "UNIT": 8}
    result = replace(sound[0], kernel="score_rows", tiles=tiles, num_warps=4, matrix="")
    paired = replace(result, loops=(loop(64, 600),))
    assert modules.aot.promises.promises(paired, launch, gpu) == []
    (reason,) = modules.aot.promises.promises(replace(result, loops=(loop(128, 600),)), launch, gpu)
    assert reason == "1.00 reciprocals for an element of a concat loop, expected .5"
    (reason,) = modules.aot.promises.promises(result, launch, gpu)
    assert reason == "0 loops with paired reciprocals, expected 1"
    narrow = replace(paired, wide_loads=0)
    assert modules.aot.promises.promises(narrow, launch, gpu) == ["no load of 16 bytes"]
    small = replace(narrow, tiles=tiles | {"BLOCK_T": 16})  # 8 scores a thread
    assert modules.aot.promises.promises(small, launch, gpu) == []


def test_both_roles_of_the_gradients_are_counted(
    sound: tuple[object, object, object], modules: SimpleNamespace
) -> None:
    """Four rows of the other side meet 32 x 64 terms on 128 threads, or 16 x 64."""
    loop = modules.aot.compile.Loop
    launch, gpu = launched(modules, "concat", "concat_gradients")
    options = {"BLOCK_T": 32, "BLOCK_S": 16, "BLOCK_A": 64, "num_warps": 4}
    launch = launch._replace(options=launch.options | options)
    assert modules.aot.compile.loop_elements(launch) == (64, 32)
    result = replace(sound[0], kernel="concat_gradients", matrix="")
    paired = replace(result, loops=(loop(32, 500), loop(16, 350)))
    assert modules.aot.promises.promises(paired, launch, gpu) == []
    second = replace(result, loops=(loop(32, 500), loop(32, 350)))
    (reason,) = modules.aot.promises.promises(second, launch, gpu)
    assert reason == "1.00 reciprocals for an element of a concat loop, expected .5"
    (reason,) = modules.aot.promises.promises(replace(result, loops=(loop(32, 500),)), launch, gpu)
    assert reason == "1 loops with paired reciprocals, expected 2"
    # Without a gradient for the query there is one role.
    names = launch.kernel.arg_names
    given = dict(zip(names, launch.arguments, strict=False)) | {"grad_query_proj": None}
    alone = launch._replace(arguments=tuple(given.values()))
    assert modules.aot.compile.loop_elements(alone) == (32,)


def test_loops_are_read_from_machine_code(modules: SimpleNamespace) -> None:
    aot_compile = modules.aot.compile
    code = """
        /*0010*/                   MOV R1, c[0x0][0x28] ;
        /*0020*/                   FFMA R2, R3, R4, R5 ;
        /*0030*/                   MUFU.RCP R6, R2 ;
        /*0040*/              @!P0 BRA 0x20 ;
        /*0050*/                   MUFU.EX2 R6, R2 ;
        /*0060*/                   MUFU.RCP R6, R2 ;
        /*0070*/               @P1 BRA `(.L_x_1) 0x50 ;
        /*0080*/                   BRA 0x90 ;
        /*0090*/                   EXIT ;
    """
    found = list(aot_compile.loops(code))
    assert [sum(loop.values()) for loop in found] == [3, 3]
    assert aot_compile.paired_loops(code) == ((1, 3),)
