"""Speeds up Triton's interpreter by removing repeated work.

Before a kernel is interpreted, the interpreter replaces the functions of `triton.language` by its
own. It does this again at every call of a @triton.jit function from the kernel, although everything
is replaced already, and searches the whole language for it: a third of a test's time.
"""

from __future__ import annotations

from functools import cache
from typing import Any


def patch_once_a_launch() -> None:
    """Patch the interpreter to replace the functions once per launch, when a kernel starts."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    if not hasattr(interpreter, "_LangPatchScope"):  # this version works differently
        return
    patch = interpreter._patch_lang
    languages = {id(interpreter.tl), id(interpreter.tl.core)}
    launches: list[set[int]] = []  # in a launch: the modules whose functions have been replaced

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
        return None  # the result of a call within a kernel is not used

    interpreter._patch_lang = patched
