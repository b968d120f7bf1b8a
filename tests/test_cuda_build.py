"""csrc/cuda as nvcc compiled it: registers, spills and wide loads; and building without nvcc.

The machine code is read from the objects of this checkout's build.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / f"build/native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
TYPES = ("f32", "bf16", "f16")
OBJECTS = {
    name: BUILD / f"CMakeFiles/fused_attn_cuda.dir/csrc/cuda/decode_{name}.cu.o" for name in TYPES
}
KERNELS = 14  # of a type, for one architecture
KERNEL = re.compile(r"ELi(\d+)ELi(\d+)ELNS_5ScoreE([01])")  # of a mangled name


def binary(name: str) -> str | None:
    """A tool of the CUDA toolkit, from it or from the triton wheel."""
    places = [os.environ["PATH"]]
    if nvcc := shutil.which("nvcc"):
        places.append(str(Path(nvcc).resolve().parent))
    if (triton := find_spec("triton")) and triton.origin:
        places.append(str(Path(triton.origin).parent / "backends/nvidia/bin"))
    return shutil.which(name, path=os.pathsep.join(places))


needs_objects = [
    pytest.mark.skipif(
        not all(path.exists() for path in OBJECTS.values()),
        reason="no build with CUDA of this checkout under build/",
    ),
    pytest.mark.skipif(
        not (binary("cuobjdump") and binary("nvdisasm")),
        reason="no cuobjdump and nvdisasm here, from a CUDA toolkit or the triton wheel",
    ),
]


def built_with_cuda(test: object) -> object:
    for mark in needs_objects:
        test = mark(test)
    return test


def run(*command: str | Path | None, **environment: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | environment
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def dump(name: str, *options: str) -> str:
    tools = str(Path(binary("nvdisasm") or "").parent)
    path = os.pathsep.join((tools, os.environ["PATH"]))
    return run(binary("cuobjdump"), *options, OBJECTS[name], PATH=path)


def rows_in_flight(elements: int, size: int) -> int:
    registers = elements * size // 4
    return 1 if registers >= 32 else 4 if registers <= 8 else 2


@built_with_cuda
@pytest.mark.parametrize("name", TYPES)
def test_no_kernel_spills(name: str) -> None:
    """Nor keeps an array in memory: both would be read and written again for every row."""
    for image in dump(name, "-res-usage").split("Fatbin elf code")[1:]:
        functions = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", image)
        assert len(functions) == KERNELS
        for function, registers, stack, local in functions:
            assert (stack, local) == ("0", "0"), function
            elements, queries, _ = map(int, KERNEL.search(function).groups())
            most = 128 if elements <= 32 and queries == 1 else 255
            assert int(registers) <= most, function


@built_with_cuda
@pytest.mark.parametrize("name", TYPES)
def test_memory_is_read_16_bytes_at_a_time(name: str) -> None:
    """As many loads as there are pieces of the rows in flight, and of the exponentials."""
    images = dump(name, "-sass").split("Fatbin elf code")[1:]
    assert images
    for image in images:
        functions = re.split(r"Function : ", image)[1:]
        assert len(functions) == KERNELS
        for function in functions:
            elements, _, score = map(int, KERNEL.search(function).groups())
            size = 4 if name == "f32" else 2
            pieces = elements * size // 16
            wide = re.findall(
                r"LDG\.E\.128\S*CONSTANT", function
            )  # not those of other blocks' sums
            assert len(wide) >= rows_in_flight(elements, size) * (pieces + score), function[:99]
            assert "LDL" not in function and "STL" not in function


def configure(home: Path, *options: str, **environment: str) -> str:
    """Configure a build; return what it would tell of CUDA."""
    import cmake
    import ninja
    import pybind11

    run(
        *(Path(cmake.CMAKE_BIN_DIR, "cmake"), "-S", ROOT, "-B", home, "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR, 'ninja')}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        *options,
        **environment,
    )
    return (home / "cuda_build.h").read_text(encoding="utf-8")


needs_cxx = pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++"))), reason="no C++ compiler"
)


@needs_cxx
def test_a_broken_nvcc_leaves_a_build_without_cuda(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    nvcc.chmod(0o755)
    found = configure(tmp_path / "build", CUDACXX=str(nvcc))
    assert f'R"why(CMake\'s test of the compiler {nvcc} failed)why"' in found
    assert 'kCudaArchitectures[] = ""' in found


@needs_cxx
def test_a_build_without_cuda_says_so(tmp_path: Path) -> None:
    found = configure(tmp_path / "off", "-DFUSED_ATTN_CUDA=OFF")
    assert 'R"why(it was switched off (FUSED_ATTN_CUDA=OFF))why"' in found
    why = "compiling with it failed"
    found = configure(tmp_path / "off", "-DFUSED_ATTN_CUDA=OFF", f"-DFUSED_ATTN_CUDA_WHY={why}")
    assert f'R"why({why})why"' in found


@needs_cxx
@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc here")
def test_architectures_are_the_users_or_ours_however_often_it_configures(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for _ in range(2):
        assert 'kCudaArchitectures[] = "80-real 90' in configure(ours)
    asked = "-DCMAKE_CUDA_ARCHITECTURES=86-real;90"
    for options in ((asked,), ()):
        assert 'kCudaArchitectures[] = "86-real 90"' in configure(theirs, *options)


def test_the_module_imports_without_a_driver() -> None:
    """The runtime of CUDA in it looks for the driver when it is first called."""
    pytest.importorskip("fused_attn._C", exc_type=ImportError)
    code = "from fused_attn import _C; print(sorted(_C.cuda_build()))"
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    printed = run(sys.executable, "-c", code, **hidden)
    assert printed.strip() == "['architectures', 'missing', 'toolkit']"
