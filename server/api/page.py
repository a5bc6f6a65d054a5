"""The page ``/policies``: plain HTML that loads nothing and refreshes itself."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING

import jinja2

if TYPE_CHECKING:
    from server.api.schemas import Estimate, PolicyList, Stats


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    source = files("server.api").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["size"] = size
    return environment.from_string(source)


def size(count: float) -> str:
    """Bytes for a person."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def page(listed: PolicyList, sizes: Estimate, live: Stats | None) -> str:
    """Render the page."""
    return _template().render(listed=listed, sizes=sizes, live=live)
