"""Values of options that need more than a type."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from loadtest.errors import LoadTestError
from loadtest.hide import read_key
from loadtest.measuring.scrape import USUAL
from loadtest.workloads.jsonl import strict_json

if TYPE_CHECKING:
    from pathlib import Path

OWN_FIELDS = {"model", "prompt", "messages", "stream", "stream_options"}


def read_pattern(text: str) -> str:
    """A regular expression, as it is.

    Raises:
        LoadTestError: it is none.

    """
    try:
        re.compile(f"({USUAL}|{text})")  # as it will stand
    except re.error as error:
        raise LoadTestError(f"--metric-names {text!r}: {error}") from None
    return text


def read_extra(text: str | None, policy: str | None) -> dict[str, Any]:
    """What is added to each request's body.

    Raises:
        LoadTestError: not an object, or it sets what the load test sets itself.

    """
    try:
        extra = strict_json(text) if text else {}
    except ValueError as error:
        raise LoadTestError(f"--extra-body is {error}") from None
    if not isinstance(extra, dict):
        raise LoadTestError("--extra-body is not a JSON object")
    if own := sorted(OWN_FIELDS & extra.keys()):
        raise LoadTestError(f"--extra-body: {', '.join(own)}: the load test sets this itself")
    if policy:
        extra["vllm_xargs"] = {**_xargs(extra, policy), "cache_policy": policy}
    return extra


def _xargs(extra: dict[str, Any], policy: str) -> dict[str, Any]:
    given = extra.get("vllm_xargs")
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise LoadTestError("--extra-body: vllm_xargs is not a JSON object")
    if given.get("cache_policy", policy) != policy:
        other = given["cache_policy"]
        raise LoadTestError(f"--extra-body: cache_policy is {other!r}, --cache-policy {policy!r}")
    return given


def read_api_key(file: Path | None) -> str | None:
    """The key in a file, or in OPENAI_API_KEY.

    Raises:
        LoadTestError: no such file, no key in it, or one that no header can carry.

    """
    if file is None:
        return read_key(os.environ.get("OPENAI_API_KEY", ""), "OPENAI_API_KEY")
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise LoadTestError(f"--api-key-file {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise LoadTestError(f"--api-key-file {file}: not a text") from None
    key = read_key(text, f"--api-key-file {file}")
    if key is None:
        raise LoadTestError(f"--api-key-file {file}: there is no key in it")
    return key
