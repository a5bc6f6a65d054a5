"""What becomes of a request's body: names that carry a method, wrong keys, prompt compression.

vLLM's own handlers stay as they are, and what is not an object of JSON is left to their refusal.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMError

from cache_policies.errors import PolicyError
from cache_policies.spelling import near, refuse_near
from cache_policies.vllm_plugin.config import POLICY_KEY
from cache_policies.vllm_plugin.frontend import check_keys, check_method
from server.api.refusal import RefusalError
from server.compression import CompressorError
from server.compression.request import FIELD as COMPRESSION
from server.compression.request import compress_request

if TYPE_CHECKING:
    from collections.abc import Iterator

    from server.api.asked import Asked
    from server.api.state import ServerState
    from server.compression.request import Report

COMPLETIONS = ("/v1/completions", "/v1/chat/completions")
# what names an adapter, vLLM's own and SageMaker's
LOADS_ADAPTER = {"/v1/load_lora_adapter": "lora_name", "/adapters": "name"}
STRICT = ("/v1/systemone", "/v1/decisions")  # refuse fields that they do not have
XARGS = "vllm_xargs"
_YES = ("true", "1", "yes", "on", "t", "y")  # what pydantic takes for true


async def translate(
    body: bytes, path: str, state: ServerState, asked: Asked
) -> tuple[bytes, Report | None]:
    """The body vLLM gets, and what became of the prompt.

    Args:
        body: as it came.
        path: of the route.
        state: of the server.
        asked: the request; its method is set.

    Raises:
        RefusalError: it asks for what cannot be.

    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return body, None
    if not isinstance(content, dict):
        return body, None
    _refuse_wrong(content, path, state)
    wanted = content.get("use_beam_search")
    asked.beams = wanted == 1 or str(wanted).lower() in _YES
    with _refused("model"):
        named = _name_method(content, state)
    asked.method, where = _method(content)
    where = "model" if named else where
    if named and path in STRICT:  # ``asked`` carries the method
        del content[XARGS]
    if asked.method is not None:
        if asked.beams:
            raise RefusalError(
                400, "a policy of its own cannot be combined with beam search", where
            )
        with _refused(where):
            check_method(asked.method)
    report = await _compress(content, path, state)
    return (json.dumps(content).encode() if named or report else body), report


@contextmanager
def _refused(param: str) -> Iterator[None]:
    """Turn an error about a policy into a refusal that names the field."""
    try:
        yield
    except PolicyError as error:
        raise RefusalError(400, str(error), param) from None


def _refuse_wrong(content: dict[str, Any], path: str, state: ServerState) -> None:
    """Refuse what vLLM would ignore, or not survive."""
    if not isinstance(content.get("structured_outputs"), dict | None):
        # vLLM 0.32 looks into it before it checks what it is, and answers 500
        raise RefusalError(400, "structured_outputs must be an object", "structured_outputs")
    if not isinstance(content.get(XARGS), dict | None):
        raise RefusalError(400, f"{XARGS} must be an object", XARGS)
    with _refused("body"):
        refuse_near(content, (XARGS, COMPRESSION), "the request")
    if misplaced := [k for k in content if k == POLICY_KEY or near(k, [POLICY_KEY])]:
        raise RefusalError(
            400, f"{POLICY_KEY} belongs into {XARGS}, or behind the model's name as NAME@METHOD",
            misplaced[0],
        )  # fmt: skip
    name = LOADS_ADAPTER.get(path, "")
    adapter = content.get(name)
    if isinstance(adapter, str) and adapter in state.names.aliases:
        raise RefusalError(400, f"{adapter!r} is an alias of this server (--policy-alias)", name)


def _name_method(content: dict[str, Any], state: ServerState) -> bool:
    """Turn a model name that carries a method into the model and the method.

    Raises:
        PolicyError: the policy is given twice.

    """
    model = content.get("model")
    found = state.names.resolve(model) if isinstance(model, str) else None
    if found is None:
        return False
    if _method(content)[0] is not None:
        raise PolicyError(
            f"the policy is given twice: in the model name {model!r} and in the request"
        )
    content["model"] = found[0]
    content[XARGS] = {**(content.get(XARGS) or {}), POLICY_KEY: found[1]}
    return True


def _method(content: dict[str, Any]) -> tuple[Any, str]:
    """The method a body asks for (None: it does not), and where.

    Raises:
        RefusalError: it is given twice, or beside it a key that is almost ours.

    """
    params = content.get("sampling_params")  # of /inference/v1/generate
    places = {
        XARGS: content.get(XARGS),
        "sampling_params": params.get("extra_args") if isinstance(params, dict) else None,
    }
    found: tuple[Any, str] = None, XARGS
    for where, extra in places.items():
        if not isinstance(extra, dict):
            continue
        with _refused(where):
            check_keys(extra)
        if extra.get(POLICY_KEY) is not None:
            if found[0] is not None:
                raise RefusalError(400, f"{POLICY_KEY} is given twice", where)
            found = extra[POLICY_KEY], where
    return found


async def _compress(content: dict[str, Any], path: str, state: ServerState) -> Report | None:
    """Shorten the prompt, where the request or the server's default says so.

    Raises:
        RefusalError: it cannot be done, or not on this route.

    """
    wanted = content.pop(COMPRESSION, None)
    if path not in COMPLETIONS:
        if wanted is not None:
            raise RefusalError(400, f"{COMPRESSION} works on {', '.join(COMPLETIONS)}", COMPRESSION)
        return None
    try:
        found = await state.compressor(wanted)
        if found is None:
            return None
        return await compress_request(content, *found, state.tokenizer)
    except CompressorError as error:
        raise RefusalError(400, str(error), COMPRESSION) from None
    except VLLMError as error:  # of the engine, under `selective`; vLLM's handlers stand further in
        found = create_error_response(error).error
        raise RefusalError(found.code, found.message) from None
