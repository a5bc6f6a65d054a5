"""How HTTP clients are made: loopback is asked directly, others through the environment's proxy."""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
from contextlib import suppress
from functools import lru_cache
from importlib.util import find_spec
from typing import Any
from urllib.request import getproxies

import httpx

from loadtest.errors import NO_SERVER, LoadTestError
from loadtest.hide import public_url


@lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def connection(url: str) -> dict[str, Any]:
    """Keyword arguments of an httpx client, or of ``httpx.get``, for one server.

    httpx's own reading of the environment is switched off: it sends loopback through a proxy, and
    fails for a proxy that no request of ours would use.

    Raises:
        LoadTestError: the proxy cannot be had, or ``url`` is not one.

    """
    return {"proxy": proxy_of(url), "trust_env": False, "verify": _tls()}


def is_loopback(host: str) -> bool:
    """Whether a host name or address, without brackets, is this machine."""
    name = host.rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    with suppress(ValueError):
        address = ipaddress.ip_address(name.partition("%")[0])
        mapped = getattr(address, "ipv4_mapped", None) or address
        return bool(mapped.is_loopback or mapped.is_unspecified)
    return False


def proxy_of(url: str) -> httpx.Proxy | None:
    """The proxy that HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY give a URL; None: directly.

    Raises:
        LoadTestError: the proxy cannot be had, or ``url`` is not one.

    """
    try:
        asked = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise LoadTestError(f"{public_url(url)}: {error}", NO_SERVER) from None
    known = getproxies()
    found = known.get(asked.scheme) or known.get("all")
    if not found or is_loopback(asked.host) or _excepted(asked, known.get("no", "")):
        return None
    text = found if "://" in found else f"http://{found}"
    shown = f"{_variable(asked.scheme)}: the proxy {public_url(text)!r}"
    way_out = f"to ask {asked.host} directly set NO_PROXY={asked.host}"
    try:
        proxy = httpx.Proxy(text)
    except (ValueError, httpx.InvalidURL):
        proxy = None
    if proxy is None or not proxy.url.host:
        allowed = "http, https, socks5 or socks5h"
        raise LoadTestError(f"{shown} is not a URL of {allowed}; {way_out}", NO_SERVER)
    if proxy.url.scheme.startswith("socks") and find_spec("socksio") is None:
        raise LoadTestError(f"{shown} needs socksio (pip install socksio); {way_out}", NO_SERVER)
    return proxy


def _variable(scheme: str) -> str:
    """Name of the variable that ``getproxies`` took a proxy from; lower case goes first there."""
    names = (f"{scheme}_proxy", "all_proxy")
    both = [spelled for name in names for spelled in (name, name.upper())]
    return next((name for name in both if os.environ.get(name)), "proxy")


def _excepted(url: httpx.URL, text: str) -> bool:
    """Whether NO_PROXY names a URL's host: names, domains, addresses, networks, with ports or *."""
    host = url.host.rstrip(".").lower()
    port = url.port or {"http": 80, "https": 443}.get(url.scheme)
    return any(_names(entry.lower(), host, port) for entry in re.split(r"[,\s]+", text) if entry)


def _names(entry: str, host: str, port: int | None) -> bool:
    if entry == "*":
        return True
    entry = entry.rpartition("://")[2]
    with suppress(ValueError):
        network = ipaddress.ip_network(entry.strip("[]"), strict=False)
        with suppress(ValueError):
            return ipaddress.ip_address(host) in network
        return False
    name, colon, number = entry.rpartition(":")
    if colon and number.isdecimal():
        return int(number) == port and _names(name, host, port)
    name = entry.removeprefix("*").strip(".")
    return host == name or host.endswith(f".{name}")
