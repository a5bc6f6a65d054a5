"""Keeping keys and passwords out of whatever is printed or written."""

from __future__ import annotations

import json
import re
from urllib.parse import quote

from loadtest.errors import LoadTestError

HIDDEN = "***"
_NAMES = (
    r"(?:api[-_]?key|access[-_]?key|(?:\w+[-_])?token|password|passwd|secret|authorization|"
    r"signature|sig)"
)
_USER = re.compile(r"(?<=://)[^/?#@\s]*@")
_PARAMETER = re.compile(rf"(?i)(?<=[?&;])({_NAMES}=)[^&#\s]+")
_MEMBER = re.compile(rf"""(?i)(["']{_NAMES}["']\s*:\s*)("[^"]*"|'[^']*'|\[[^\]]*\])""")
_FLAG = re.compile(rf"(?i)^(--{_NAMES})(?:=.*)?$", re.DOTALL)


def public_url(url: str) -> str:
    """A URL without user, password, and the values of parameters that hold secrets."""
    return _PARAMETER.sub(rf"\g<1>{HIDDEN}", _USER.sub("", url))


def public_arguments(arguments: list[str]) -> list[str]:
    """A command line without its secrets: in URLs, JSON, and options such as ``--api-key``."""
    shown: list[str] = []
    hiding = False
    for text in arguments:
        flag = _FLAG.match(text)
        if flag:
            shown.append(f"{flag[1]}={HIDDEN}" if "=" in text else text)
            hiding = "=" not in text  # vLLM's --api-key takes several
        elif hiding and not text.startswith("-"):
            shown.append(HIDDEN)
        else:
            hiding = False
            shown.append(_MEMBER.sub(rf'\g<1>"{HIDDEN}"', public_url(text)))
    return shown


def hide(text: str, key: str | None) -> str:
    """A text, a server's message say, without the key, be it as it is or escaped."""
    for spelled in {key, json.dumps(key)[1:-1], quote(key, safe="")} if key else ():
        text = text.replace(spelled, HIDDEN)
    return text


def read_key(text: str, where: str) -> str | None:
    """An API key as a user stored it: blanks and line ends around it are none of it.

    Args:
        text: what was stored.
        where: e.g. ``OPENAI_API_KEY``, for the message, which never holds the key.

    Raises:
        LoadTestError: no header can carry it.

    """
    key = text.strip().strip("\ufeff").strip()
    if not all("!" <= character <= "~" for character in key):
        raise LoadTestError(
            f"{where}: a blank, a line break or a character outside of ASCII inside the API key; "
            "write the key alone, without 'Bearer'"
        )
    return key or None
