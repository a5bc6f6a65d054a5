"""Entry point ``vllm.endpoint_plugins``: our routes in vLLM's own server.

``kvthrift serve`` names it in ``VLLM_PLUGINS``, as vLLM wants it; so can a user of vLLM's command.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, Any

from fastapi import Request  # noqa: TC002 - FastAPI reads the annotation
from fastapi.responses import JSONResponse
from starlette.middleware import Middleware
from vllm.entrypoints.serve.middleware import authenticate
from vllm.logger import init_logger

from cache_policies.errors import PolicyError
from cache_policies.vllm_plugin.frontend import check_method
from server.api.asked import watch
from server.api.middleware import LOG, Limits, PolicyMiddleware
from server.api.names import ModelNames, parse_aliases
from server.api.policies import router
from server.api.refusal import RefusalError
from server.api.state import ServerState
from server.compression import Compressor, LLMLingua2, SelectiveContext
from server.compression.base import CompressorError
from server.compression.served import ServedTokenizer

if TYPE_CHECKING:
    from argparse import Namespace

    from fastapi import FastAPI
    from starlette.datastructures import State

MAX_BODY = 64 << 20
KILL_MARGIN = 2  # seconds
GUARDED = (
    "/invocations", "/generative_scoring", "/tokenize", "/detokenize", "/adapters",
    "/scale_elastic_ep",
)  # fmt: skip
logger = init_logger("vllm.kvthrift.server")
_processes: list[Any] = []  # of the engine, where this process started it


def engine_died() -> bool:
    """Whether an engine process failed; vLLM's server then stops as if it had been told to."""
    return any(process.exitcode for process in _processes)


class PolicyEndpoints:
    """Routes, model names and usage of cache policies."""

    name = "kvthrift"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._state = ServerState()

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, and the middleware around vLLM's routes."""
        app.state.kvthrift = self._state
        # vLLM wants no key on these; can go when they are in its list.
        guarded = dict.fromkeys((*authenticate.GUARDED_PREFIX, *GUARDED))
        authenticate.GUARDED_PREFIX = tuple(guarded)
        app.include_router(router)
        app.add_api_route("/v1/models", list_models, methods=["GET"])
        app.add_api_route("/v1/models/{name:path}", show_model, methods=["GET"])
        args = app.state.args
        limits = Limits(
            getattr(args, "max_request_bytes", MAX_BODY),
            getattr(args, "max_concurrent_requests", None),
            log=getattr(args, "log_requests_json", False),
        )
        if limits.log:
            _log_plain_lines()
        # Last is innermost: within vLLM's count of answers, which so has those that we give.
        ours = Middleware(PolicyMiddleware, state=self._state, limits=limits)
        app.user_middleware.append(ours)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Take the engine's configuration, and watch what its requests held."""
        ours = self._state
        ours.vllm_config = engine_client.vllm_config
        ours.names = _names(args, state.openai_serving_models.lora_requests)
        free = ours.vllm_config.model_config.is_attention_free
        watch(engine_client, ours.shape.constant_bytes if free else 0)
        _offer_compression(engine_client, ours, getattr(args, "prompt_compressor", None))
        ours.compression = getattr(args, "prompt_compression", None)
        await ours.compressor(None)  # a default that cannot be done ends the start
        manager = getattr(engine_client.engine_core.resources, "engine_manager", None)
        _processes[:] = manager.processes if manager else []
        _drain(engine_client, ours, owner=manager is not None)


def _offer_compression(engine_client: Any, state: ServerState, classifier: str | None) -> None:
    """Make the compressors, or note why there are none.

    Raises:
        CompressorError: there are none, and a classifier was given.

    """
    try:
        state.tokenizer = ServedTokenizer(engine_client.renderer.get_tokenizer())
    except ValueError as error:  # there is none, or it does not say where tokens lie
        if classifier:
            raise CompressorError(f"--prompt-compressor {classifier}: {error}") from None
        state.why_no_compressor = str(error)
        logger.warning("kvthrift: prompts cannot be compressed here: %s", error)
    else:
        state.compressors = _compressors(engine_client, state.tokenizer, classifier)


def _compressors(
    engine_client: Any, tokenizer: ServedTokenizer, classifier: str | None
) -> dict[str, Compressor]:
    """Those this server can offer."""
    found: list[Compressor] = [SelectiveContext(engine_client, tokenizer)]
    if classifier:
        found.insert(0, LLMLingua2(classifier))
    return {compressor.name: compressor for compressor in found}


def _log_plain_lines() -> None:
    """Each line of the request log is JSON and nothing else, on the standard output."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    LOG.propagate = False


def _drain(engine_client: Any, state: ServerState, *, owner: bool) -> None:
    """Let what runs end before the engine's client is closed, and refuse what comes meanwhile.

    Of several API processes none owns the engine, and vLLM closes their clients at once, with all
    they wait for; it waits only in the one that owns the engine. Can go when it always does.
    """
    close = engine_client.shutdown

    def shutdown(timeout: float | None = None) -> None:  # on a thread beside the event loop
        state.stopping = True
        # their parent kills them at the end of the same limit
        until = time.monotonic() + max(0.0, (timeout or 0) - KILL_MARGIN)
        unfinished = engine_client.output_processor.get_num_unfinished_requests
        while not owner and unfinished() and time.monotonic() < until:
            time.sleep(0.05)
        close(timeout)

    engine_client.shutdown = shutdown


def _names(args: Namespace, adapters: dict[str, Any]) -> ModelNames:
    """The names of a server.

    Raises:
        PolicyError: an alias has the name of a model or an adapter.

    """
    from vllm import envs

    served = list(args.served_model_name or [args.model])
    texts = getattr(args, "policy_alias", None) or []
    return ModelNames(
        served=served,
        aliases=parse_aliases(texts, [*served, *adapters]),
        adapters=adapters,
        any_base=envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING or envs.VLLM_SKIP_MODEL_NAME_VALIDATION,
    )


async def _cards(request: Request) -> dict[str, Any]:
    """VLLM's list, with a card for each alias."""
    listed = await request.app.state.openai_serving_models.show_available_models()
    content: dict[str, Any] = listed.model_dump()
    state: ServerState = request.app.state.kvthrift
    content["data"] += [
        _with_method(content["data"][0], alias, method)
        for alias, method in state.names.aliases.items()
    ]
    return content


def _with_method(base: dict[str, Any], name: str, method: str) -> dict[str, Any]:
    return {**base, "id": name, "parent": base["id"], "cache_policy": method}


async def list_models(request: Request) -> JSONResponse:
    """The models: those of vLLM, and a card for each alias."""
    return JSONResponse(await _cards(request))


async def show_model(name: str, request: Request) -> JSONResponse:
    """One model: by its name, an alias, or NAME@METHOD."""
    cards = {card["id"]: card for card in (await _cards(request))["data"]}
    if name in cards:
        return JSONResponse(cards[name])
    state: ServerState = request.app.state.kvthrift
    try:
        found = state.names.resolve(name)
        method = str(check_method(found[1])) if found else ""
    except PolicyError as error:
        return RefusalError(400, str(error), "model").response(request.url.path)
    if found is None or found[0] not in cards:
        refusal = RefusalError(404, f"The model `{name}` does not exist.", "model")
        return refusal.response(request.url.path)
    return JSONResponse(_with_method(cards[found[0]], name, method))
