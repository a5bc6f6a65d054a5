"""``python -P -m server.container``: the kvthrift command, the words of $ARGUMENTS behind its own.

Compose files have one string where a user writes flags. It is split as a shell splits words, with
quotes, and nothing in it is run or replaced: ``--policy-alias fast='snapkv(budget=512)'``.
"""

from __future__ import annotations

import os
import shlex
import sys

VARIABLE = "ARGUMENTS"


def words(text: str) -> list[str]:
    """The words of a line of flags.

    Raises:
        SystemExit: a quote is not closed.

    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise SystemExit(f"kvthrift: {VARIABLE}: {error}: {text}") from None


if __name__ == "__main__":
    from server.cli import main

    sys.argv = ["kvthrift", *sys.argv[1:], *words(os.environ.get(VARIABLE, ""))]
    main()
