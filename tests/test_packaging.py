"""The sdist, the wheel built from it, and an install without a working C++ compiler.

Everything is built from a copy of the checkout, offline, with the tools of this environment.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path, PurePosixPath

import pytest
import torch

import fused_attn

ROOT = Path(__file__).resolve().parent.parent
NOT_SHIPPED = (".*", "build", "dist", "runs", "__pycache__", "*.egg-info", "*.so", "_native_*.txt")
# In one worker, see conftest: the builds are shared.
pytestmark = pytest.mark.timeout(900)


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        command, cwd=cwd, env=clean | environment, capture_output=True, text=True, check=False
    )


def build(source: Path, out: Path, *options: str, **environment: str) -> str:
    """Build where importing torch or triton is an error. Returns the output."""
    forbidden = out.parent / "forbidden"
    for name in ("torch", "triton"):
        (forbidden / name).mkdir(parents=True, exist_ok=True)
        (forbidden / name / "__init__.py").write_text(f"raise ImportError('a build used {name}')")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, *options, source]
    done = run(*command, cwd=out.parent, PYTHONPATH=str(forbidden), **environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def install(wheel: Path, home: Path) -> Path:
    """Install a wheel into a new environment that also has torch. Returns its interpreter."""
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    done = run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=home)
    assert done.returncode == 0, done.stderr
    # A path in a .pth file adds a directory, but not the editable installs inside it.
    (site,) = home.glob("lib/python*/site-packages")
    (site / "torch_from_outside.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return python


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with the sdist and the wheel that was built from it."""
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    home = tmp_path_factory.mktemp("packaging")
    shutil.copytree(ROOT, home / "checkout", ignore=shutil.ignore_patterns(*NOT_SHIPPED))
    # The tests do not depend on optimisation, and without it the build takes a third of the time.
    # One GPU architecture is enough: the others are compiled in the same way.
    arguments = "-DCMAKE_BUILD_TYPE=Debug -DCMAKE_CUDA_ARCHITECTURES=90-real"
    options = {"CMAKE_ARGS": arguments, "FUSED_ATTN_REQUIRE_NATIVE": "1"}
    build(home / "checkout", home / "dist", **options)
    return home / "dist"


@pytest.fixture(scope="session")
def sdist(dist: Path) -> Path:
    (path,) = dist.glob("*.tar.gz")
    return path


@pytest.fixture(scope="session")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def installed(wheel: Path) -> Path:
    return install(wheel, wheel.parent.parent / "installed")


@pytest.fixture(scope="session")
def installed_without_compiler(sdist: Path) -> Path:
    """The interpreter of an environment where the sdist was installed without a compiler."""
    home = sdist.parent.parent / "no_compiler"
    shutil.unpack_archive(sdist, home, filter="data")
    (source,) = home.iterdir()
    output = build(source, home / "dist", "--wheel", CXX="/nonexistent/c++")
    assert "without its native module" in output and "no usable C++ compiler" in output
    (path,) = (home / "dist").glob("*.whl")
    return install(path, home / "installed")


def shipped(*patterns: str) -> set[str]:
    """Relative paths of files in the checkout that a package must contain."""
    return {
        path.relative_to(ROOT).as_posix()
        for pattern in patterns
        for path in ROOT.glob(pattern)
        if path.is_file() and not any(map(path.match, NOT_SHIPPED))
    }


def test_build_requirements_are_without_torch() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    names = {re.match(r"[\w-]+", text)[0] for text in settings["build-system"]["requires"]}
    assert names == {"setuptools", "pybind11", "cmake", "ninja"}


def test_sdist_holds_every_source(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {
            PurePosixPath(name).relative_to(f"fused_attn-{fused_attn.__version__}").as_posix()
            for name in archive.getnames()
        }
    assert shipped("csrc/**/*", "kernels/*.py", "fused_attn/**/*.py", "tests/*.py") <= held
    assert {"setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE"} <= held
    assert not {name for name in held if name.endswith((".so", "_native_build_error.txt"))}


def test_wheel_holds_the_package_and_nothing_beside_it(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    metadata = f"fused_attn-{fused_attn.__version__}.dist-info"
    assert {PurePosixPath(name).parts[0] for name in held} == {"fused_attn", metadata}
    assert shipped("fused_attn/**/*.py", "fused_attn/py.typed", "fused_attn/*.pyi") <= held
    assert {f"fused_attn/{name}" for name in shipped("kernels/*.py")} <= held
    # A model, and the notice of the data that it was trained on.
    models = shipped("fused_attn/models/*/*")
    assert "fused_attn/models/g2p/NOTICE" in models and models <= held
    assert f"{metadata}/licenses/LICENSE" in held
    binaries = {name for name in held if ".so" in name}
    assert len(binaries) == 1 and binaries.pop().startswith("fused_attn/_C.")


def test_wheel_metadata(wheel: Path) -> None:
    (name,) = (n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("dist-info/METADATA"))
    fields = Parser().parsestr(zipfile.ZipFile(wheel).read(name).decode())
    assert (fields["Name"], fields["Version"]) == ("fused-attn", fused_attn.__version__)
    required = [text for text in fields.get_all("Requires-Dist") if "extra ==" not in text]
    assert required == ["torch>=2.11"]


@pytest.mark.skipif(not shutil.which("readelf"), reason="binutils are not installed")
def test_native_module_links_the_system_libraries_only(wheel: Path, tmp_path: Path) -> None:
    (name,) = (name for name in zipfile.ZipFile(wheel).namelist() if ".so" in name)
    module = zipfile.ZipFile(wheel).extract(name, tmp_path)
    dynamic = run("readelf", "--dynamic", "--wide", module, cwd=tmp_path).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    # libgomp under its plain name is the one that torch loads; no libtorch, no libpython.
    system = r"libgomp\.so\.1|libomp\.so\.5|libstdc\+\+\.so\.6|ld-.*"
    system += r"|lib(gcc_s|c|m|pthread|dl|rt)\.so\.\d"
    assert needed and all(re.fullmatch(system, library) for library in needed), needed
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


USE = """
import torch, fused_attn, fused_attn.kernels
query, memory = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
expected, _ = fused_attn.dot_attention(query, memory, backend="eager")
context, _ = fused_attn.dot_attention(query, memory)
torch.testing.assert_close(context, expected)
print(fused_attn.__file__, fused_attn.kernels.__file__, sep="\\n")
"""


def test_installed_wheel_works_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    done = run(installed, "-W", "error", "-c", USE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for file in done.stdout.split():
        assert Path(file).is_relative_to(installed.parent.parent)
    report = run(installed, "-m", "fused_attn.info", cwd=tmp_path).stdout
    assert ["cpu", "usable"] in [line.split() for line in report.splitlines()]
    assert (installed.parent / "fused-attn").exists()


def test_installed_wheel_leaves_the_name_kernels_alone(installed: Path, tmp_path: Path) -> None:
    done = run(installed, "-c", "import kernels", cwd=tmp_path)
    assert "ModuleNotFoundError: No module named 'kernels'" in done.stderr


def test_kernels_of_a_checkout_explain_themselves() -> None:
    done = run(sys.executable, "-c", "import kernels", cwd=ROOT)
    assert "ImportError: this is the source directory of fused_attn.kernels" in done.stderr


def test_install_without_a_compiler_runs_on_eager(
    installed_without_compiler: Path, tmp_path: Path
) -> None:
    python = installed_without_compiler
    done = run(python, "-c", USE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    asked = USE.replace("memory)\ntorch", 'memory, backend="cpu")\ntorch')
    refused = run(python, "-c", asked, cwd=tmp_path).stderr
    assert "ValueError" in refused and "no usable C++ compiler was found" in refused


def test_install_without_a_compiler_says_why(
    installed_without_compiler: Path, tmp_path: Path
) -> None:
    report = run(installed_without_compiler, "-m", "fused_attn.info", cwd=tmp_path).stdout
    assert "no usable C++ compiler was found" in report
    assert "/nonexistent/c++" in report
    assert ["eager", "usable"] in [line.split() for line in report.splitlines()]


def test_a_build_can_insist_on_the_native_module(sdist: Path, tmp_path: Path) -> None:
    shutil.unpack_archive(sdist, tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    command = (sys.executable, "-m", "build", "--no-isolation", "--wheel", source)
    done = run(*command, cwd=tmp_path, CXX="/nonexistent/c++", FUSED_ATTN_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert "no usable C++ compiler was found" in done.stdout + done.stderr
