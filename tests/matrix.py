"""Run the tests that depend on the versions of torch and Python, with several versions.

``make test-matrix`` runs this. Each combination has a virtual environment under ``build/matrix``,
with torch pinned, the extra ``test``, and a wheel of this checkout. The wheel is built once for
each Python, because its native module must work with every torch. Environments are reused and
updated.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "matrix"
WHEELS: dict[str, Path] = {}  # wheels built by this process, by Python version

# Every torch on the oldest Python, and every Python with the torch of CI.
COMBINATIONS = ("3.11/2.11.0", "3.11/2.13.0", "3.11/2.14.1", "3.12/2.13.0", "3.13/2.13.0")

# Test files are in the matrix unless their names start with one of these: tests that do not depend
# on the version of torch or Python (documents, figures, sizes and ranges of kernel arithmetic,
# kernels compiled ahead of time), and tests of the build and of commands.
LEFT_OUT = (
    *("architecture", "backends_", "benchmarks", "cli", "cuda", "documents", "fuzz", "launch"),
    *("matrix", "native_objects", "packaging", "peak_memory", "problem", "seq2seq", "triton"),
)
# The toolkit's tests in the matrix: a model and its gradients, search, training.
SEQ2SEQ = ("seq2seq_model", "seq2seq_search", "seq2seq_training")
# Interpreted Triton would take most of the time. `make test-triton-oldest` tests its versions.
SELECTION = "not triton"


class NotRun(Exception):
    """A combination cannot be set up on this machine; the message has the reason."""


class NoWheel(Exception):
    """The package does not build with an available Python, which counts as a failure."""


@dataclass(frozen=True)
class Combination:
    python: str
    torch: str

    @classmethod
    def parse(cls, text: str) -> Combination:
        python, slash, torch = text.partition("/")
        if not slash or python.count(".") != 1 or torch.count(".") != 2:
            raise argparse.ArgumentTypeError(f"a combination is like 3.11/2.13.0, got {text!r}")
        return cls(python, torch)

    def __str__(self) -> str:
        return f"Python {self.python}, torch {self.torch}"

    @property
    def directory(self) -> Path:
        return WORK / f"python{self.python}-torch{self.torch}"


@dataclass(frozen=True)
class Outcome:
    words: str
    ok: bool
    ran: bool = True


def version_of(interpreter: str, env: dict[str, str] | None = None) -> str:
    """``"3.11"`` for a Python 3.11 that can create virtual environments, ``""`` otherwise."""
    code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    try:
        process = subprocess.run([interpreter, "-c", code], capture_output=True, text=True, env=env)
    except OSError:
        return ""
    return process.stdout.strip() if process.returncode == 0 else ""


def find_python(version: str, given: Sequence[str]) -> str:
    """An interpreter of a version: a given one, this one, one on PATH, or one of pyenv."""
    name = f"python{version}"
    for candidate in (*given, sys.executable, name):
        if version_of(candidate) == version:
            return candidate
    if pyenv := shutil.which("pyenv"):
        listed = subprocess.run([pyenv, "versions", "--bare"], capture_output=True, text=True)
        for installed in reversed(listed.stdout.split()):
            if not installed.startswith(f"{version}."):
                continue
            prefix = subprocess.run([pyenv, "prefix", installed], capture_output=True, text=True)
            candidate = str(Path(prefix.stdout.strip(), "bin", name))
            if version_of(candidate) == version:
                return candidate
    raise NotRun(f"no {name} on PATH or from pyenv; --python PATH names one")


def run(log: Path, step: str, command: Sequence[str | Path], **env: str) -> None:
    """Run a command and append its output to the log. Raise NotRun if it fails."""
    # This script's own environment must not affect the environments that it creates.
    outer = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    with log.open("a", encoding="utf-8") as file:
        print(f"\n$ {' '.join(map(str, command))}", file=file, flush=True)
        process = subprocess.run(
            command, cwd=ROOT, env=outer | env, stdout=file, stderr=subprocess.STDOUT
        )
    if process.returncode:
        lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        raise NotRun(f"{step} failed: {errors[-1]} ({log.relative_to(ROOT)})")


def copy_sources() -> Path:
    """Copy the sources of a wheel, so that building it does not touch the checkout's own build.

    Modification times are kept, so that only changed files are compiled again.
    """
    copy = WORK / "source"
    for name in ("csrc", "fused_attn", "kernels"):  # otherwise removed files would stay
        shutil.rmtree(copy / name, ignore_errors=True)
    for built in copy.glob("build/lib*"):
        shutil.rmtree(built)
    copy.mkdir(parents=True, exist_ok=True)
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "_native_build_error.txt")
    for name in ("csrc", "fused_attn", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy2(ROOT / name, copy)
    return copy


def build_wheel(python: Path, version: str, log: Path) -> Path:
    """The wheel of this checkout for a Python, built for the first combination that needs it."""
    if version in WHEELS:
        return WHEELS[version]
    wheels = WORK / f"wheel-python{version}"
    shutil.rmtree(wheels, ignore_errors=True)
    try:
        run(
            log,
            "building the wheel",
            [python, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", wheels, copy_sources()],
            FUSED_ATTN_REQUIRE_NATIVE="1" if shutil.which(os.environ.get("CXX", "c++")) else "0",
            CMAKE_ARGS="-DFUSED_ATTN_CUDA=OFF",  # no test in the matrix runs CUDA kernels
        )
    except NotRun as error:
        raise NoWheel(str(error)) from error
    (WHEELS[version],) = wheels.glob("*.whl")
    return WHEELS[version]


def install(combination: Combination, interpreter: str, log: Path) -> Path:
    """Set up the environment with this checkout's package, and return its Python."""
    python = combination.directory / "bin" / "python"
    if version_of(str(python)) != combination.python:
        shutil.rmtree(combination.directory, ignore_errors=True)
        run(log, "making the environment", [interpreter, "-m", "venv", combination.directory])
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    torch = f"torch=={combination.torch}"
    run(log, "installing torch", [*pip, torch])
    wheel = build_wheel(python, combination.python, log)
    # torch is pinned again, so that the dependencies of the tests cannot change its version.
    with_extra = f"fused-attn[test] @ {wheel.as_uri()}"
    run(log, "installing the package", [*pip, torch, with_extra])
    # Its version number never changes, so pip would mistake an earlier wheel for this one.
    run(log, "installing the package", [*pip, "--no-deps", "--force-reinstall", wheel])
    return python


def test_files() -> list[Path]:
    """The test files of the matrix."""
    files = []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        name = path.stem.removeprefix("test_")
        if name in SEQ2SEQ or not name.startswith(LEFT_OUT):
            files.append(path.relative_to(ROOT))
    return files


def read_results(results: Path) -> Outcome:
    """Read the outcome from pytest's JUnit file."""
    suite = xml.etree.ElementTree.parse(results).getroot().find("testsuite")
    assert suite is not None
    number = {key: int(suite.get(key, "0")) for key in ("tests", "skipped", "failures", "errors")}
    failed = number["failures"] + number["errors"]
    passed = number["tests"] - number["skipped"] - failed
    words = f"{passed} passed, {failed} failed, {number['skipped']} skipped"
    return Outcome(words, ok=failed == 0 and passed > 0)


def run_tests(python: Path, combination: Combination, options: Sequence[str], log: Path) -> Outcome:
    results = combination.directory / "results.xml"
    results.unlink(missing_ok=True)
    command = [python, "-m", "pytest", "-n", "2", "-k", SELECTION]
    command.append(f"--junitxml={results}")
    try:
        # With PYTHONSAFEPATH the checkout is not on sys.path: the installed package is tested.
        run(log, "pytest", [*command, *options, *test_files()], PYTHONSAFEPATH="1")
    except NotRun as error:
        if not results.exists():
            return Outcome(str(error), ok=False)
        outcome = read_results(results)
        return Outcome(f"{outcome.words} ({log.relative_to(ROOT)})", ok=False)
    return read_results(results)


def run_combination(
    combination: Combination, pythons: Sequence[str], options: Sequence[str]
) -> Outcome:
    WORK.mkdir(parents=True, exist_ok=True)
    log = WORK / f"{combination.directory.name}.log"
    log.unlink(missing_ok=True)
    try:
        python = install(combination, find_python(combination.python, pythons), log)
    except NotRun as error:
        return Outcome(f"not run: {error}", ok=True, ran=False)
    except NoWheel as error:
        return Outcome(str(error), ok=False)
    started = time.monotonic()
    outcome = run_tests(python, combination, options, log)
    versions = installed_versions(python)
    seconds = time.monotonic() - started
    return Outcome(f"{outcome.words} in {seconds:.0f} s, {versions}", ok=outcome.ok)


def installed_versions(python: Path) -> str:
    """The versions that were tested, with the build of torch."""
    names = ["torch", "triton", "numpy"]
    code = (
        "import importlib.metadata as m, json, platform, torch;"
        f"found = {{name: m.version(name) for name in {names}}};"
        "found['torch'] = torch.__version__;"
        "print(json.dumps({'Python': platform.python_version()} | found))"
    )
    process = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return ", ".join(f"{name} {version}" for name, version in json.loads(process.stdout).items())


def exit_status(outcomes: Sequence[Outcome], strict: bool) -> int:
    """1 if a test failed; if strict, also if a combination was not run."""
    return int(any(not outcome.ok or (strict and not outcome.ran) for outcome in outcomes))


def main(
    arguments: Sequence[str] | None = None,
    run_one: Callable[[Combination, Sequence[str], Sequence[str]], Outcome] = run_combination,
) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "combinations",
        nargs="*",
        type=Combination.parse,
        metavar="PYTHON/TORCH",
        help=f"for example 3.11/2.13.0; without one: {' '.join(COMBINATIONS)}",
    )
    parser.add_argument(
        "--python", action="append", default=[], metavar="PATH", help="an interpreter to use"
    )
    parser.add_argument(
        "--strict", action="store_true", help="also fail if a combination cannot be set up"
    )
    parser.add_argument(
        "--pytest", action="append", default=[], metavar="OPTION", help="an option for pytest"
    )
    options = parser.parse_args(arguments)
    combinations = options.combinations or list(map(Combination.parse, COMBINATIONS))
    outcomes = []
    for combination in combinations:
        outcome = run_one(combination, options.python, options.pytest)
        print(f"{combination}: {outcome.words}", flush=True)
        outcomes.append(outcome)
    return exit_status(outcomes, options.strict)


if __name__ == "__main__":
    sys.exit(main())
