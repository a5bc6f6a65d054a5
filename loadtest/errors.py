"""Errors a user can mend; the command prints one line and exits with the given status."""

from __future__ import annotations

USAGE = 2
SOME_FAILED = 1
TOO_MANY_ERRORS = 3
NO_SERVER = 4
CANNOT_WRITE = 5
INTERRUPTED = 130


class LoadTestError(Exception):
    """Something is wrong with the options, the data or the server.

    Attributes:
        status: exit status of the command.

    """

    def __init__(self, message: str, status: int = USAGE) -> None:
        super().__init__(message)
        self.status = status
