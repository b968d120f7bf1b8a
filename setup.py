"""Build fused_attn: CMake compiles the native module, setuptools packages it.

Metadata is in pyproject.toml. Nothing here imports torch or triton, so an isolated build needs
neither. If the native module cannot be compiled, the package still installs and falls back to its
eager backend; ``fused-attn info`` then reports the reason, which is stored inside the package. Set
FUSED_ATTN_REQUIRE_NATIVE=1 at build time to make a failed compilation an error.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
REASON_FILE = "_native_build_error.txt"  # fused_attn/backends/cpu.py reads it


class CMakeExtension(Extension):
    """An extension module that CMakeLists.txt builds and installs."""

    def __init__(self, name: str) -> None:
        optional = os.environ.get("FUSED_ATTN_REQUIRE_NATIVE", "0") in ("", "0")
        super().__init__(name, sources=[], optional=optional)


class CMakeBuild(build_ext):
    def build_extension(self, ext: CMakeExtension) -> None:
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        module.parent.mkdir(parents=True, exist_ok=True)
        reason_file = module.with_name(REASON_FILE)
        for stale in (module, reason_file):
            stale.unlink(missing_ok=True)
        try:
            run_cmake(install_prefix=module.parent.parent)
        except CompileError as error:
            reason_file.write_text(f"{error}\n", encoding="utf-8")
            if ext.optional:
                self.warn("fused_attn is built without its native module and uses eager attention")
            raise

    def copy_extensions_to_source(self) -> None:
        """Copy the result of an in-place build, the module or the reason, to the source tree."""
        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name))
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            for stale in (target, target.with_name(REASON_FILE)):
                stale.unlink(missing_ok=True)
            if (reason_file := built.with_name(REASON_FILE)).exists():
                shutil.copy(reason_file, target.with_name(REASON_FILE))
        super().copy_extensions_to_source()


def run_cmake(install_prefix: Path) -> None:
    # Imported late: `setup.py --version` and building an sdist must not need them.
    import cmake
    import ninja
    import pybind11

    program = Path(cmake.CMAKE_BIN_DIR, "cmake")
    # One directory per interpreter, kept between builds. The paths of the tools change with each
    # isolated build, but the kernels do not depend on them and are not compiled again.
    build_dir = ROOT / f"build/native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    configure = [
        *(program, "-S", ROOT, "-B", build_dir, "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR, 'ninja')}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        "-DFUSED_ATTN_CUDA=AUTO",  # otherwise OFF stays in the cache after a failed CUDA build
        *shlex.split(os.environ.get("CMAKE_ARGS", "")),
    ]
    try:
        run_step("configuring", configure)
    except CompileError:
        if not build_dir.exists():
            raise
        shutil.rmtree(build_dir)  # its cache may hold the path of a moved compiler or checkout
        run_step("configuring", configure)
    compile_step = [program, "--build", build_dir]
    try:
        run_step("compiling", compile_step)
    except CompileError:
        if not compiles_cuda_by_chance(build_dir):
            raise
        # nvcc passed CMake's check but failed on our sources: build the CPU code without it.
        why = "compiling the CUDA sources failed, see the output of the build"
        run_step(
            "configuring", [*configure, "-DFUSED_ATTN_CUDA=OFF", f"-DFUSED_ATTN_CUDA_WHY={why}"]
        )
        run_step("compiling", compile_step)
    run_step("installing", [program, "--install", build_dir, "--prefix", install_prefix])


def compiles_cuda_by_chance(build_dir: Path) -> bool:
    """Whether the build uses nvcc because it was found, and not because the user asked for it."""
    cache = (build_dir / "CMakeCache.txt").read_text(encoding="utf-8").splitlines()
    return {"FUSED_ATTN_CUDA:STRING=AUTO", "FUSED_ATTN_CUDA_MISSING:INTERNAL="} <= set(cache)


def run_step(step: str, command: list[str | Path]) -> None:
    process = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    print(process.stdout, flush=True)
    if process.returncode == 0:
        return
    reason = f"{step} the native module failed with exit code {process.returncode}"
    if "CMAKE_CXX_COMPILER" in process.stdout:
        reason = f"no usable C++ compiler was found ({reason})"
    last_lines = "\n".join(process.stdout.strip().splitlines()[-20:])
    raise CompileError(f"{reason}; the last lines of its output:\n{last_lines}")


setup(
    packages=[*find_packages(include=["fused_attn", "fused_attn.*"]), "fused_attn.kernels"],
    package_dir={"fused_attn": "fused_attn", "fused_attn.kernels": "kernels"},
    package_data={"fused_attn": ["py.typed", "_C.pyi", "models/*/*", "seq2seq/*/*.html"]},
    ext_modules=[CMakeExtension("fused_attn._C")],
    cmdclass={"build_ext": CMakeBuild},
)
