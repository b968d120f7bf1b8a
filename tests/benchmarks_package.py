"""Import the package `benchmarks`, which is not installed, without the checkout on sys.path."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
LOCATION = ROOT / "benchmarks"


@contextmanager
def imported() -> Iterator[ModuleType]:
    """The package with all of its modules: ``package.suite.cases`` is `benchmarks.suite.cases`."""
    spec = importlib.util.spec_from_file_location(
        "benchmarks", LOCATION / "__init__.py", submodule_search_locations=[str(LOCATION)]
    )
    package = importlib.util.module_from_spec(spec)
    before = dict(sys.modules)
    sys.modules["benchmarks"] = package
    spec.loader.exec_module(package)
    needs_triton = {"benchmarks.aot.compile", "benchmarks.aot.promises"}
    absent = set() if importlib.util.find_spec("triton") else needs_triton
    for path in sorted(LOCATION.rglob("*.py")):
        parts = path.relative_to(LOCATION.parent).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        if name not in absent and not path.stem.startswith("test_"):
            importlib.import_module(name)
    yield package
    for name in set(sys.modules) - set(before):
        if name.split(".")[0] == "benchmarks":
            del sys.modules[name]
