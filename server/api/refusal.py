"""A request that is refused before vLLM sees it, in the error form of the API it was sent to."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

_OPENAI = {
    404: "NotFoundError", 413: "request_too_large", 429: "rate_limit_exceeded",
    503: "service_unavailable",
}  # fmt: skip
_ANTHROPIC = {413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error"}


class RefusalError(Exception):
    """Why, and with which status."""

    def __init__(self, status: int, message: str, param: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, headers

    def response(self, path: str = "") -> JSONResponse:
        """The answer on a route, which is one of OpenAI's where none is given."""
        return JSONResponse(self._content(path), self.status, self.headers)

    def _content(self, path: str) -> dict[str, Any]:
        error: dict[str, Any]
        if path.startswith("/cohere/"):
            return {"message": self.message}
        if path.startswith("/v1/messages"):
            kind = _ANTHROPIC.get(self.status, "invalid_request_error")
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        kind = _OPENAI.get(self.status, "BadRequestError")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.status}
        return {"error": error}
