"""Options of ``fused-attn train`` in a YAML file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from fused_attn.seq2seq.errors import InputError

_SUFFIXES = (".yaml", ".yml")


def is_config_file(text: str) -> bool:
    """Whether TASK names a file."""
    return text.endswith(_SUFFIXES)


def read_config(path: str) -> list[str]:
    """Return the arguments that a file stands for: its task, then its options.

    Sections only make the file readable: an option in a section counts like one outside of it.

    Raises `InputError` if the file cannot be read, names no task, or has an option with more than
    one value.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise InputError(f"cannot read {path}: {reason}") from None
    if not isinstance(values, dict) or not isinstance(values.get("task"), str):
        raise InputError(f"{path}: expected a line 'task: NAME' and one option per line")
    options: list[str] = []
    for name, value in _flat(values):
        option = name.replace("_", "-")
        if isinstance(value, bool):
            options.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, (str, int, float)):
            options.append(f"--{option}={value}")
        elif value is not None:
            raise InputError(f"{path}: {name} must have one value, got {value!r}")
    return [values["task"], *options]


def _flat(values: Mapping[object, object]) -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value)
        elif name != "task":
            yield str(name), value
