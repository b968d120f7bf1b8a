"""Options of ``fused-attn train`` in a YAML file.

Only what options need of YAML is read: names and single values, in sections or not. Aliases, tags
and lists are errors, so a file cannot stand for more than it says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fused_attn.seq2seq.errors import InputError

_SUFFIXES = (".yaml", ".yml")
_LARGEST_FILE = 1 << 16  # bytes
_DEEPEST = 4  # sections within sections
_LONGEST_VALUE = 4096  # characters: the longest path of Linux
_NAME = re.compile(r"[A-Za-z][\w-]*")


def is_config_file(text: str) -> bool:
    """Whether TASK names a file."""
    return text.endswith(_SUFFIXES)


def read_config(path: str) -> list[str]:
    """Return the arguments that a file stands for: its task, then its options.

    Sections only make the file readable: an option in a section counts like one outside of it.

    Raises `InputError` if the file cannot be read, names no task, names an option twice, or has an
    option with more than one value.
    """
    import yaml

    try:
        with Path(path).open("rb") as file:
            data = file.read(_LARGEST_FILE + 1)
        if len(data) > _LARGEST_FILE:
            raise InputError(f"{path} is too large for a file of options, over {len(data) - 1:,} B")
        found = list(_options(path, yaml.SafeLoader(data.decode("utf-8-sig"))))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    tasks = [value for name, value in found if name == "task"]
    if len(tasks) != 1 or not tasks[0]:
        raise InputError(f"{path}: expected a line 'task: NAME' and one option per line")
    return [tasks[0], *(option for name, option in found if name != "task")]


def _options(path: str, loader: Any) -> Iterator[tuple[str, str]]:
    """Yield the name and the argument of each option; for ``task`` its value, "" for none."""
    import yaml

    name: str | None = None  # of the option whose value comes next
    depth = 0
    seen: set[str] = set()
    while loader.check_event():
        event = loader.get_event()
        line = f"{path}, line {event.start_mark.line + 1}"
        if isinstance(event, (yaml.SequenceStartEvent, yaml.AliasEvent)) and name is not None:
            raise InputError(f"{line}: {name} must have one value")
        if getattr(event, "anchor", None) is not None:
            raise InputError(f"{line}: anchors and aliases are not allowed")
        if getattr(event, "tag", None) is not None:
            raise InputError(f"{line}: tags such as {event.tag[:40]} are not allowed")
        if isinstance(event, yaml.MappingStartEvent):
            if depth and name is None:
                raise InputError(f"{line}: a section is not the name of an option")
            if (depth := depth + 1) > _DEEPEST:
                raise InputError(f"{line}: sections are nested more than {_DEEPEST} deep")
            name = None
        elif isinstance(event, yaml.MappingEndEvent):
            depth -= 1
        elif isinstance(event, yaml.DocumentStartEvent) and seen:
            raise InputError(f"{line}: expected one document")
        elif isinstance(event, (yaml.ScalarEvent, yaml.SequenceStartEvent)):
            if depth == 0 or isinstance(event, yaml.SequenceStartEvent):
                raise InputError(f"{path}: expected a line 'task: NAME' and one option per line")
            if name is None:
                name = _name(line, event.value)
                continue
            key, argument = name.replace("_", "-"), _argument(line, name, event, loader)
            name = None
            if key in seen:
                raise InputError(f"{line}: {key} is given twice")
            seen.add(key)
            if argument is not None:
                yield key, event.value if key == "task" else argument


def _name(line: str, text: str) -> str:
    if not _NAME.fullmatch(text) or not text.isascii():
        raise InputError(f"{line}: {text[:40]!r} is not the name of an option")
    return text


def _argument(line: str, name: str, event: Any, loader: Any) -> str | None:
    """The argument for an option with the value of a scalar; None if that is null."""
    import yaml

    text: str = event.value
    if len(text) > _LONGEST_VALUE or "\0" in text or _has_surrogates(text):
        raise InputError(f"{line}: {name} has a value that no option takes")
    option = name.replace("_", "-")
    kind = loader.resolve(yaml.ScalarNode, text, event.implicit)
    if kind == "tag:yaml.org,2002:null":
        return None
    if kind == "tag:yaml.org,2002:bool":
        return f"--{option}" if loader.bool_values[text.lower()] else f"--no-{option}"
    return f"--{option}={text}"


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)
