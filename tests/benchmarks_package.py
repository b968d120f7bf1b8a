"""Import the package `benchmarks`, which is not installed, without the checkout on sys.path."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
LOCATION = ROOT / "benchmarks"


@contextmanager
def imported() -> Iterator[SimpleNamespace]:
    """Yield its modules by name, `__main__` as ``main``, and the package itself as ``package``."""
    spec = importlib.util.spec_from_file_location(
        "benchmarks", LOCATION / "__init__.py", submodule_search_locations=[str(LOCATION)]
    )
    package = importlib.util.module_from_spec(spec)
    before = dict(sys.modules)
    sys.modules["benchmarks"] = package
    spec.loader.exec_module(package)
    absent = {"__init__"} | (set() if importlib.util.find_spec("triton") else {"aot_compile"})
    files = [path for path in LOCATION.glob("*.py") if not path.stem.startswith("test_")]
    names = [path.stem for path in files if path.stem not in absent]
    loaded = {name: importlib.import_module(f"benchmarks.{name}") for name in names}
    yield SimpleNamespace(package=package, main=loaded.pop("__main__"), **loaded)
    for name in set(sys.modules) - set(before):
        if name.split(".")[0] == "benchmarks":
            del sys.modules[name]
