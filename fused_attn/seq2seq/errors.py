"""Errors that the user can fix."""

from __future__ import annotations


class InputError(Exception):
    """An input cannot be used. The message is one line that names the input and the reason.

    The command prints the message without a traceback and exits with code 2.
    """


class OptionError(InputError):
    """The value of an option cannot be used.

    name: the option as spelled in Python. The command prints it as ``--name``.
    reason: the rest of the sentence after the name; it may begin with a colon.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(_sentence(name, reason))
        self.name = name
        self.reason = reason

    @property
    def on_the_command_line(self) -> str:
        """The message with the option as spelled on the command line."""
        return _sentence(f"--{self.name.replace('_', '-')}", self.reason)


def _sentence(name: str, reason: str) -> str:
    return f"{name}{'' if reason.startswith(':') else ' '}{reason}"
