"""The errors that the user can put right."""

from __future__ import annotations


class InputError(Exception):
    """What was given cannot be used. The message is one line that says what and why.

    The command prints it without a traceback and exits with code 2.
    """


class OptionError(InputError):
    """The value of an option cannot be used.

    name: of the option, as it is called in Python. The command prints it as ``--name``.
    reason: the rest of the sentence; a colon may begin it.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(_sentence(name, reason))
        self.name = name
        self.reason = reason

    @property
    def on_the_command_line(self) -> str:
        """The message with the option as it is typed."""
        return _sentence(f"--{self.name.replace('_', '-')}", self.reason)


def _sentence(name: str, reason: str) -> str:
    return f"{name}{'' if reason.startswith(':') else ' '}{reason}"
