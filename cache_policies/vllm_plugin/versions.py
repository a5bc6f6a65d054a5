"""Where vLLM 0.32 and 0.33 differ for us. Can go with support for 0.32.

What ends a request that the scheduler refuses: 0.32 keeps a set of such requests, and their clients
get an HTTP 500 that says nothing; 0.33 keeps their errors, which reach the client as an HTTP 400.
For 0.32 the reason goes with the output, by the field that KV connectors have, to the server's
process, which raises there what 0.33 raises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.v1.engine import EngineCoreOutputs

REFUSAL = "kv_cache_refusal"


def end_with_error(scheduler: Any, request_id: str, message: str) -> None:
    """End a request of which the next step's outputs are to tell, as vLLM does with bad grammars.

    Args:
        scheduler: vLLM's.
        request_id: of a request that it knows by then.
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


def say_why(batches: Mapping[int, EngineCoreOutputs], refused: Mapping[str, str]) -> None:
    """Send the reasons along with the outputs of requests that are refused.

    Args:
        batches: outputs of a step.
        refused: reasons by id of the request.

    """
    for output in (o for batch in batches.values() for o in batch.outputs):
        if output.request_id in refused:
            output.kv_transfer_params = {REFUSAL: refused[output.request_id]}


def why_refused(output: Any) -> str | None:
    """Why the scheduler refused a request, by its output in the server's process; None: not."""
    found = (output.kv_transfer_params or {}).get(REFUSAL)
    return None if found is None else str(found)
