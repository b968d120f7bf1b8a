"""The error that is the user's to put right."""

from __future__ import annotations


class InputError(Exception):
    """What was given cannot be used. The message is one line that says what and why.

    The command prints it without a traceback and exits with code 2.
    """
