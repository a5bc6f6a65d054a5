"""Servers of the tests are on loopback: no proxy of the environment stands before them."""

from __future__ import annotations

import os

for name in ("http_proxy", "https_proxy", "all_proxy"):
    os.environ.pop(name, None)
    os.environ.pop(name.upper(), None)
