"""The policy string: parse, validate, print back.

Grammar: ``term ('+' term)*``, a term being ``name`` or ``name(key=value, ...)``. One term may
name a codec (how a stored token is encoded), one another codec for the first and last layers,
one a retention method (which tokens stay), one a retrieval method (which pages of them a query
reads), and one sparse prefill (which pages the prompt's queries read)::

    kivi-2bit    snapkv(budget=1024)    snapkv(budget=1024)+kivi-4bit    infllm(topk=16)+int8
    kivi-2bit+layers(first=2,last=2,codec=fp16)    snapkv(budget=1024)+sparse-prefill(coverage=0.9)
    snapkv(budget=4096)+quest(topk=8)+kivi-4bit

Without a codec, tokens are stored in float16.
"""

from __future__ import annotations

import re
import reprlib
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from cache_policies.errors import PolicyError
from cache_policies.pages.codecs import CODECS
from cache_policies.parameters import parameters, read_arguments, shown
from cache_policies.policy.layers import EdgeLayers
from cache_policies.retention import retention_methods
from cache_policies.retention.base import UNIFORM
from cache_policies.retrieval import PREFILL, RETRIEVAL

if TYPE_CHECKING:
    from cache_policies.pages.codecs.base import Codec
    from cache_policies.retention.base import Retention
    from cache_policies.retrieval.base import Retrieval
    from cache_policies.retrieval.sparse_prefill import SparsePrefill

EDGE_PARAMETERS = parameters(EdgeLayers)
DEFAULT_CODEC = "fp16"
EDGES = EdgeLayers.name
KEEP_ALL = "all"  # a request's way to say: no retention method, every page is read

LONGEST = 1000  # letters of a policy; a request's text is read where others wait for it

_TERM = re.compile(r"\s*([a-z][a-z0-9-]*)\s*(?:\(([^()]*)\)\s*)?")


@dataclass(frozen=True)
class Method:
    """What one request may choose: which tokens stay, and which pages a query reads.

    With both, tokens are dropped first and pages chosen among what stayed, as the two stages of
    RocketKV (arXiv 2502.14051) are.

    Attributes:
        retention: None: every token stays.
        retrieval: None: every page is read.
        prefill: None: the prompt's queries read every page too.

    """

    retention: Retention | None = None
    retrieval: Retrieval | None = None
    prefill: SparsePrefill | None = None

    def __str__(self) -> str:
        """The canonical string; it parses back to an equal method."""
        return "+".join(map(str, self.parts)) or KEEP_ALL

    @property
    def parts(self) -> tuple[Retention | Retrieval | SparsePrefill, ...]:
        """What was asked for."""
        return tuple(p for p in (self.retention, self.retrieval, self.prefill) if p is not None)

    @property
    def is_plain(self) -> bool:
        """Whether every token stays and is read."""
        return not self.parts

    @property
    def bounded(self) -> bool:
        """Whether the prompt's queries see a part of the tokens before them only."""
        return any(p.bounded for p in (self.retention, self.retrieval) if p is not None)


@dataclass(frozen=True)
class Policy:
    """A parsed policy.

    Attributes:
        codec: how a stored token is encoded; the same for every request of an engine.
        codec_name: the codec's name as the user wrote it, e.g. ``kivi-4bit``.
        method: what is kept and read; a request may choose another.
        edges: first and last layers, where they have another codec.

    """

    codec: Codec
    codec_name: str
    method: Method = Method()
    edges: EdgeLayers | None = None

    def __str__(self) -> str:
        """The canonical string; it parses back to an equal policy."""
        return self.codec_string if self.method.is_plain else f"{self.method}+{self.codec_string}"

    @property
    def codec_string(self) -> str:
        """The canonical string of the codecs alone."""
        entry = CODECS[self.codec_name]
        text = shown(self.codec_name, self.codec, parameters(entry.cls, dict(entry.fixed)))
        return f"{text}+{shown(EDGES, self.edges, EDGE_PARAMETERS)}" if self.edges else text


def parse(text: str) -> Policy:
    """Parse a policy string.

    Raises:
        PolicyError: unknown name or parameter, value out of range, bad syntax or an impossible
            combination; the message names what is allowed.

    """
    return _parse(_string(text, _allowed()))


@lru_cache(maxsize=1024)
def _parse(text: str) -> Policy:
    method, layout = _split(text, _allowed())
    codecs = [term for term in layout if term[0] != EDGES]
    edges = [term for term in layout if term[0] == EDGES]
    if max(len(codecs), len(edges)) > 1:
        what = "codec" if len(codecs) > 1 else f"term {EDGES!r}"
        raise PolicyError(f"cache policy {text!r}: only one {what} can be given; {_allowed()}")
    name, arguments = codecs[0] if codecs else (DEFAULT_CODEC, None)
    entry = CODECS[name]
    allowed = parameters(entry.cls, dict(entry.fixed))
    try:
        codec = entry.build(**read_arguments(name, arguments, allowed))
        return Policy(codec, name, method, _edges(codec, *edges[0]) if edges else None)
    except PolicyError as error:
        raise PolicyError(f"cache policy {text!r}: {error}") from None


def _edges(codec: Codec, name: str, arguments: str | None) -> EdgeLayers:
    edges = EdgeLayers(**read_arguments(name, arguments, EDGE_PARAMETERS))  # type: ignore[arg-type]
    if edges.built == codec:
        raise PolicyError(f"{EDGES}: codec={edges.codec} is that of the other layers already")
    return edges


def parse_method(text: str) -> Method:
    """Parse what a request may choose: ``all``, or methods.

    Of retention methods, retrieval methods and sparse prefills one each.

    Raises:
        PolicyError: as ``parse``, and for a codec, which is the server's to choose.

    """
    return _parse_method(_string(text, _allowed_methods()))


@lru_cache(maxsize=1024)
def _parse_method(text: str) -> Method:
    method, layout = _split(text, _allowed_methods())
    if layout:
        what = "layers" if layout[0][0] == EDGES else f"the codec {layout[0][0]!r}"
        raise PolicyError(
            f"cache policy {text!r}: a request cannot choose {what}, which "
            "fixes the page layout of the whole server (kvthrift serve --cache-policy); "
            f"{_allowed_methods()}"
        )
    return method


def _string(text: object, allowed: str) -> str:
    if isinstance(text, str) and len(text) > LONGEST:
        raise PolicyError(
            f"cache_policy has {len(text)} letters, and at most {LONGEST} are taken; {allowed}"
        )
    if not isinstance(text, str) or not text.strip():
        raise PolicyError(
            f"cache_policy must be a non-empty string, not {reprlib.repr(text)}; {allowed}"
        )
    return text


def _split(text: str, allowed: str) -> tuple[Method, list[tuple[str, str | None]]]:
    """The method of a policy string, and what decides its pages: names with their arguments."""
    layout: list[tuple[str, str | None]] = []
    methods: list[Method] = []
    for term in text.split("+"):
        match = _TERM.fullmatch(term)
        if not match:
            raise PolicyError(f"cache policy {text!r} is not name(key=value,...); {allowed}")
        name, arguments = match[1], match[2]
        if name in CODECS or name == EDGES:
            layout.append((name, arguments))
        else:
            methods.append(_method(text, name, arguments, allowed))
    return _combined(text, methods), layout


def _combined(text: str, methods: list[Method]) -> Method:
    whole = Method()
    for method in methods:
        for kind in ("retention", "retrieval", "prefill"):
            one, other = getattr(whole, kind), getattr(method, kind)
            if one and other:
                raise PolicyError(
                    f"cache policy {text!r}: {one} and {other} cannot be combined; only one "
                    f"retention method, one retrieval method and one {', '.join(PREFILL)} can be "
                    "given"
                )
            whole = replace(whole, **{kind: one or other})
    try:
        _refuse_together(whole)
    except PolicyError as error:
        raise PolicyError(f"cache policy {text!r}: {error}") from None
    return whole


def _refuse_together(method: Method) -> None:
    """Refuse parts that would undo each other."""
    retention, retrieval, prefill = method.retention, method.retrieval, method.prefill
    if retention and retrieval and retention.counts_attention and retrieval.OBSERVES:
        raise PolicyError(
            f"{retention} and {retrieval} cannot be combined: each counts attention of its own "
            "queries; quest counts none"
        )
    if retention and retrieval and retention.adaptive:
        raise PolicyError(
            f"{retention} and {retrieval} cannot be combined: a page of every head is chosen by "
            f"one number, and adaptive heads lack some; use heads={UNIFORM}"
        )
    if prefill and method.bounded:
        raise PolicyError(
            f"{prefill} and {replace(method, prefill=None)} cannot be combined: the prompt of a "
            "method with prefill=bounded reads a part already; give it prefill=full"
        )


def _method(text: str, name: str, arguments: str | None, allowed: str) -> Method:
    if name == KEEP_ALL and not arguments:
        return Method()
    retention = retention_methods().get(name)
    cls = method_classes().get(name)
    if cls is None:
        raise PolicyError(f"unknown cache policy {name!r}; {allowed}")
    try:
        given = read_arguments(name, arguments, cls.settable())
        if retention is not None:
            return Method(retention=retention.build(given))
        if name in PREFILL:
            return Method(prefill=PREFILL[name](**given))  # type: ignore[arg-type]
        return Method(retrieval=RETRIEVAL[name](**given))  # type: ignore[arg-type]
    except PolicyError as error:
        raise PolicyError(f"cache policy {text!r}: {error}") from None


def method_classes() -> dict[str, type[Retention | Retrieval | SparsePrefill]]:
    """What a request may choose, by name."""
    return {**retention_methods(), **RETRIEVAL, **PREFILL}


def method_names() -> list[str]:
    """What a request may choose."""
    return [KEEP_ALL, *method_classes()]


def _allowed_methods() -> str:
    return f"allowed: {', '.join(method_names())}"


def _allowed() -> str:
    return f"allowed: {', '.join(CODECS)}; and with '+': {', '.join([*method_names(), EDGES])}"
