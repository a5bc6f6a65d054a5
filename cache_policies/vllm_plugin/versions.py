"""Where vLLM 0.32 and 0.33 differ for us. Can go with support for 0.32."""

from __future__ import annotations

from typing import Any


def end_with_error(scheduler: Any, request_id: str, message: str) -> None:
    """End a request that was added already, by the way vLLM has for grammars that do not compile.

    0.32 keeps a set of such requests, 0.33 their errors, which reach the client.

    Args:
        scheduler: vLLM's.
        request_id: of a request that it knows.
        message: why.

    """
    refused = scheduler.grammar_compile_error_reqs
    if isinstance(refused, set):
        refused.add(request_id)
        return
    from vllm.outputs import RequestError

    refused[request_id] = RequestError(code="validation_error", message=message)


def serve_parser(parser: Any) -> Any:
    """VLLM's options of ``serve``, added to a parser; 0.33 has moved what adds them."""
    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser
    except ImportError:  # 0.32
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    return make_arg_parser(parser)


def prepare_environment() -> None:
    """Set what vLLM's own command sets before it serves; 0.33 has moved that too."""
    try:
        from vllm.entrypoints.common.startup import cli_env_setup
    except ImportError:  # 0.32
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    cli_env_setup()
