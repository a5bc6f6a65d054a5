"""What a server's events say of an answer, put into a record; thinking is kept apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loadtest.hide import hide
from loadtest.workloads.jsonl import strict_json

if TYPE_CHECKING:
    from loadtest.sending.records import Record
    from loadtest.sending.sse import Event

# vLLM's name today, and the older one that most servers know
THOUGHT = ("reasoning", "reasoning_content")
# where a part of a content keeps its text
TEXTS = ("text", "thinking", "reasoning", "summary", "refusal", "content", "value")
MADE = ("tool_calls", "function_call")
BROKEN = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip


def split_content(content: Any) -> tuple[str, str]:
    """Text and thinking of a content: nothing, a string, a part, or a list of parts.

    Raises:
        TypeError: none of these.

    """
    if content is None or isinstance(content, str):
        return content or "", ""
    if not isinstance(content, list | dict):
        raise TypeError(f"a content that is {type(content).__name__}")
    said: list[str] = []
    thought: list[str] = []
    for part in content if isinstance(content, list) else [content]:
        kind = str(part.get("type")) if isinstance(part, dict) else ""
        (thought if kind.startswith(("thinking", "reasoning")) else said).append(_text(part))
    return "".join(said), "".join(thought)


def _text(part: Any) -> str:
    """Text of a part; parts of other kinds, pictures say, have none."""
    if isinstance(part, str):
        return part
    if isinstance(part, list):
        return "".join(map(_text, part))
    if isinstance(part, dict):
        return next((text for name in TEXTS if (text := _text(part.get(name)))), "")
    return ""


class Answer:
    """Completes a record from the events of a stream, or from an answer that comes whole.

    Args:
        record: to complete.
        counts_events: whether the server counts tokens in every event; others may put their only
            usage into an event with choices.
        keep_thinking: whether the text of the thinking is written down.
        key: kept out of messages, in which a server may repeat it.

    """

    def __init__(
        self,
        record: Record,
        *,
        counts_events: bool,
        keep_thinking: bool = False,
        key: str | None = None,
    ) -> None:
        self._record = record
        self._key = key
        self._counts_events = counts_events
        self._keep_thinking = keep_thinking
        self._said: list[str] = []
        self._thought: list[str] = []
        self._kinds: list[str] = []  # of each event that brought tokens: "answer", "thinking", ...

    def take(self, event: Event, when: float) -> None:
        """Read an event that arrived at a time; the record fails where it is none of OpenAI's."""
        data = event.data.strip()
        if not data:  # keeps a connection alive
            return
        try:
            if event.name not in ("", "message", "error") and not data.startswith("{"):
                return  # an event of another kind
            self._stream(_object(data, event.name), when)
        except BROKEN as error:
            self._broken("invalid_sse", error, data)

    def whole(self, data: bytes) -> None:
        """Read an answer that was not streamed: no time of a token is known."""
        text = data.decode(errors="replace")
        try:
            body = _object(text, "")
            for choice in self._choices(body):
                self._read(choice, choice.get("message") or {})
            self._usage(body.get("usage"))
        except BROKEN as error:
            self._broken("invalid_json", error, text)

    def _broken(self, kind: str, error: Exception, data: str) -> None:
        # the key goes before the text is cut: half a key is one too
        why = hide(f"{type(error).__name__}: {error}", self._key)
        self._record.fail(kind, f"{why} in {hide(data, self._key)[:200]!r}")

    def close(self) -> None:
        """Write texts and counts into the record; what came before a failure too."""
        record = self._record
        record.answer = "".join(self._said)
        record.thinking = "".join(self._thought) if self._keep_thinking else ""
        if len(record.event_tokens) != len(record.events):
            record.event_tokens.clear()
        if not record.thinking_tokens:
            record.thinking_tokens = self._count_thinking()

    def _stream(self, event: dict[str, Any], when: float) -> None:
        brought: set[str] = set()
        choices = self._choices(event)
        for choice in choices:
            brought |= self._read(choice, choice.get("delta") or {})
        new = self._usage(event.get("usage"))
        # vLLM counts in every event; a token may bring no text yet (half a character)
        counted = self._counts_events and new is not None and bool(choices)
        if not brought and not (counted and new):
            return
        record = self._record
        if counted:
            record.event_tokens.append(new or 0)
        record.events.append(when)
        self._kinds.append("+".join(sorted(brought)))
        if "thinking" in brought and record.thinking_at is None:
            record.thinking_at = when
        if "answer" in brought and record.answer_at is None:
            record.answer_at = when

    def _choices(self, event: dict[str, Any]) -> list[dict[str, Any]]:
        error = event.get("error") or (event if event.get("object") == "error" else None)
        if error:
            self._record.fail("server_error", hide(str(error), self._key)[:500])
            return []
        return event.get("choices") or []

    def _read(self, choice: dict[str, Any], message: dict[str, Any]) -> set[str]:
        """Kinds of what a choice brings; of several choices the first is the answer."""
        said, thought = split_content(message.get("content"))
        said += split_content(choice.get("text"))[0] + (message.get("refusal") or "")
        named = (split_content(message.get(name)) for name in THOUGHT)
        thought += next((a + b for a, b in named if a or b), "")
        if not choice.get("index"):
            self._said.append(said)
            self._thought.append(thought if self._keep_thinking else "")
            self._record.finish_reason = choice.get("finish_reason") or self._record.finish_reason
        made = any(message.get(name) for name in MADE)
        kinds = {"answer": said or made, "thinking": thought}
        return {kind for kind, text in kinds.items() if text}

    def _usage(self, usage: dict[str, Any] | None) -> int | None:
        """Take the server's counts; gives the output tokens that are new. 0 of a kind: unknown."""
        if not usage or usage.get("completion_tokens") is None:
            return None
        record = self._record
        count = int(usage["completion_tokens"])
        new = count - (record.output_tokens or 0)
        record.usage = usage
        record.output_tokens = count
        record.prompt_tokens = int(usage.get("prompt_tokens") or 0) or None
        record.cached_tokens = _count(usage, "prompt_tokens_details", "cached_tokens")
        record.thinking_tokens = _count(usage, "completion_tokens_details", "reasoning_tokens")
        return new

    def _count_thinking(self) -> int | None:
        """Tokens of the events that thought. None: not counted, or mixed with others'.

        An event without text (a delimiter that the server's parser took away, half a character)
        belongs to the thinking while nothing else has come.
        """
        record = self._record
        if record.thinking_at is None:
            return record.thinking_tokens
        kinds = list(self._kinds)
        if not record.event_tokens or "answer+thinking" in kinds:
            return None
        for index, kind in enumerate(kinds):
            kinds[index] = kind or (kinds[index - 1] if index else "thinking")
        tokens = zip(kinds, record.event_tokens, strict=True)
        return sum(count for kind, count in tokens if kind == "thinking")


def _count(usage: dict[str, Any], group: str, name: str) -> int | None:
    """A number of tokens that not every server gives; None for what is none."""
    found = (usage.get(group) or {}).get(name)
    return int(found) if isinstance(found, (int, float)) and found >= 0 else None


def _object(text: str, name: str) -> dict[str, Any]:
    try:
        found = strict_json(text)
    except ValueError:
        if name == "error":
            return {"error": text}
        raise
    if name == "error" and not (isinstance(found, dict) and "error" in found):
        return {"error": found or text}
    if not isinstance(found, dict):
        raise TypeError(f"{type(found).__name__} instead of an object")
    return found
