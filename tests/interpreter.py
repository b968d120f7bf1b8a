"""Triton's interpreter, without work that it repeats.

Before a kernel is interpreted, the interpreter replaces the functions of `triton.language` by its
own. It does so again at every call of a @triton.jit function from within the kernel, where all are
replaced already, and looks through the whole language for them: a third of a test's time.
"""

from __future__ import annotations

from functools import cache
from typing import Any


def patch_once_a_launch() -> None:
    """From now on the functions are replaced when a kernel starts, and not while it runs."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    if not hasattr(interpreter, "_LangPatchScope"):  # a version that goes about it otherwise
        return
    patch = interpreter._patch_lang
    languages = {id(interpreter.tl), id(interpreter.tl.core)}
    launches: list[set[int]] = []  # of the one under way: the modules whose functions are replaced

    class Launch(interpreter._LangPatchScope):
        def restore(self) -> None:
            launches.clear()
            super().restore()

    @cache
    def modules_of(fn: Any) -> set[int]:
        return {id(value) for value in fn.__globals__.values()} & languages

    def patched(fn: Any) -> Any:
        found = modules_of(fn)
        if not launches:
            launches.append(set(found))
            scope = Launch()
            scope._changes = patch(fn)._changes
            return scope
        if not found <= launches[0]:
            launches[0].update(found)
            patch(fn)
        return None  # of a call within a kernel nobody asks for it

    interpreter._patch_lang = patched
