"""The one-way flow of the benchmarks, read from their imports: each room imports `common` alone.

__main__ -> the commands        gpu_check -> targets.gpu
suite, targets.cpu, targets.decoder, targets.gpu, aot, claims, swap -> common
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
from benchmarks_package import LOCATION

ROOMS = ("suite", "targets.cpu", "targets.decoder", "targets.gpu", "aot", "claims", "swap")
# What each may import, besides its own modules.
BELOW = {
    "": (),  # the package itself, which names the commands
    "common": (),
    **{room: ("common",) for room in ROOMS},
    "gpu_check": ("targets.gpu",),
    "__main__": ("",),
}
STAGES = "targets.gpu"  # a stage is a module there, imported by its name


def name_of(path: Path) -> str:
    """The module's name below `benchmarks`; "" for the package itself."""
    parts = path.relative_to(LOCATION).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {name_of(path): path for path in sorted(LOCATION.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
CODE = [name for name, path in MODULES.items() if path.stem != "__init__"]


def room(module: str) -> str:
    """The room that a module is in. Raises AssertionError if it is in none."""
    for name in BELOW:
        if module == name or (name and module.startswith(f"{name}.")):
            return name
    raise AssertionError(f"benchmarks/{module} is in no room: add it to ROOMS")


def imports(module: str) -> Iterator[str]:
    """The modules of `benchmarks` that a module imports, anywhere in its file."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            assert not [name for name in names if name.split(".")[0] == "benchmarks"], module
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} has a relative import"
            source = node.module or ""
            if source.split(".")[0] != "benchmarks":
                continue
            below = source.removeprefix("benchmarks").removeprefix(".")
            for alias in node.names:
                child = f"{below}.{alias.name}".removeprefix(".")
                yield child if child in MODULES else below


def value_of(module: str, name: str) -> Any:
    """The literal that a module assigns to ``name``."""
    for node in TREES[module].body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"{module} does not assign {name}")


def started(module: str) -> Iterator[str]:
    """The modules that a module names in a string, to run them as a process."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            package, _, name = node.value.partition(".")
            if package == "benchmarks" and name in MODULES:
                yield name


@pytest.mark.parametrize("module", CODE)
def test_imports_point_down(module: str) -> None:
    own = room(module)
    wrong = {other for other in imports(module) if room(other) not in (own, *BELOW[own])}
    assert not wrong, f"benchmarks.{module} imports upwards or sideways: {sorted(wrong)}"


def test_no_module_imports_itself_through_others() -> None:
    tuple(TopologicalSorter({module: set(imports(module)) for module in MODULES}).static_order())


def test_packages_import_nothing() -> None:
    """A room is entered through its modules, so that each pays for its own imports alone."""
    busy = [name for name in MODULES.keys() - set(CODE) if list(imports(name))]
    assert not busy


def test_every_module_is_part_of_a_command() -> None:
    """Of a benchmark, of the GPU check, or of what pytest runs."""
    commands = [name.removeprefix("benchmarks.") for name in value_of("", "BENCHMARKS").values()]
    stages = [f"{STAGES}.{name}" for name in value_of(f"{STAGES}.check", "LIMITS")]
    tests = [name for name in CODE if name.rpartition(".")[2].startswith("test_")]
    assert len(tests) == 1
    found: set[str] = set()
    left = ["__main__", "gpu_check", *commands, *stages, *tests]
    while left:
        module = left.pop()
        if module not in found:
            found.add(module)
            left += [*imports(module), *started(module)]
    assert set(CODE) <= found
