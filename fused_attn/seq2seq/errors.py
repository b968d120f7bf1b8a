"""Errors that the user can fix."""

from __future__ import annotations

import re


class InputError(Exception):
    """An input cannot be used. The message is one line that names the input and the reason.

    The command prints the message without a traceback and exits with code 2.

    text: the input and the reason.
    hint: what helps. It names options as they are typed: ``--skip-bad``.
    """

    def __init__(self, text: str, hint: str | None = None) -> None:
        super().__init__(text if hint is None else f"{text}; {named_in_python(hint)}")
        self.on_the_command_line = text if hint is None else f"{text}; {hint}"


class OptionError(InputError):
    """An option cannot be used, by itself or together with another one.

    name: Python name of the option. The command line prints it as ``--name``.
    reason: the rest of the message, starting with a colon or a word. It names other options as
        they are typed: ``--like-this``.
    typed: the option as it is typed, if that is not ``--name``.
    """

    def __init__(self, name: str, reason: str, typed: str | None = None) -> None:
        super().__init__(_sentence(name, named_in_python(reason)))
        self.on_the_command_line = _sentence(typed or f"--{name.replace('_', '-')}", reason)


def named_in_python(text: str) -> str:
    """Replace options as they are typed by their names in Python: ``skip_bad``."""
    return re.sub(r"--[a-z][a-z-]*", lambda found: found[0][2:].replace("-", "_"), text)


def _sentence(name: str, reason: str) -> str:
    return f"{name}{'' if reason.startswith(':') else ' '}{reason}"
