"""Check the values that a checkpoint names: a damaged or hostile file may have any."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar, get_type_hints

from fused_attn.seq2seq.config import LARGEST_INT

_T = TypeVar("_T")


def configured(kind: Callable[..., _T], values: Mapping[str, Any]) -> _T:
    """Return a configuration, a dataclass, with the values of a checkpoint.

    Raises TypeError or ValueError if a value is missing or of another type, or is not allowed.
    """
    if not isinstance(values, dict):
        raise TypeError(f"expected the values of {kind.__name__}, got {type(values).__name__}")
    made = kind(**values)
    check_types(made)
    return made


def check_types(made: Any) -> None:
    """Raise TypeError or ValueError unless each field of a dataclass is of its declared type.

    Types: int, float, bool, str, tuples of str, and None. Integers are at most `LARGEST_INT`,
    except for seeds.
    """
    hints = get_type_hints(type(made))
    for field in fields(made):
        check_value(field.name, getattr(made, field.name), hints[field.name])


def check_value(name: str, value: object, hint: Any) -> None:
    """Check a value as `check_types` does. name: of its field. hint: the declared type."""
    allowed = [kind.strip() for kind in _name(hint).split("|")]
    if not any(_is_of(value, kind) for kind in allowed):
        raise TypeError(f"{name} must be {_name(hint)}, got {type(value).__name__}")
    if type(value) is int and abs(value) > LARGEST_INT and name != "seed":
        raise ValueError(f"{name} must be at most {LARGEST_INT}, got a larger number")


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _is_of(value: object, kind: str) -> bool:
    if kind == "None":
        return value is None
    if kind.startswith("tuple"):
        return isinstance(value, tuple) and all(isinstance(each, str) for each in value)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value).__name__ == kind or (kind == "float" and number)
