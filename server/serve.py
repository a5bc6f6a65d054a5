"""``kvthrift serve``: vLLM's own OpenAI server with a cache policy."""

from __future__ import annotations

import argparse
import json
import os
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch

from cache_policies.errors import PolicyError
from cache_policies.kernels import KERNELS, kernel_class
from cache_policies.policy import parse
from cache_policies.spelling import refuse_near
from cache_policies.vllm_plugin.config import KERNEL_KEY, POLICY_KEY
from cache_policies.vllm_plugin.versions import prepare_environment, serve_parser
from server.api.names import parse_aliases
from server.api.plugin import MAX_BODY, engine_died
from server.compression.request import PromptCompression
from server.models import MODELS, resolve
from server.startup import (
    choose_threads,
    explain,
    misspelt,
    refuse_machine,
    refuse_remote_engines,
    size_cache,
)

DRAIN_SECONDS = 30
# oneDNN keeps code and buffers per shape of a matrix product, 1024 of them by its default. Every
# length of a batch is another shape: a worker grew by 10 MiB per 16 requests of mixed lengths.
ONEDNN_SHAPES = 128


def make_parser() -> argparse.ArgumentParser:
    """VLLM's ``serve`` parser with our options in front."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(
        prog="kvthrift serve",
        description="Serve a model with a compressed KV cache over the OpenAI API. MODEL is a "
        f"hub name, a folder, or one of {', '.join(MODELS)}. Every flag of vLLM's serve works.",
    )
    group = parser.add_argument_group("kvthrift")
    group.add_argument(
        "--cache-policy",
        help="how the KV cache is stored, e.g. kivi-4bit; `kvthrift policies` lists them. "
        "Without it vLLM's own cache is used, unchanged.",
    )
    group.add_argument("--cache-kernel", choices=KERNELS, help="attention kernel (default: auto)")
    group.add_argument(
        "--policy-alias",
        action="append",
        metavar="NAME=METHOD",
        help="a further model name that stands for a method, e.g. fast='snapkv(budget=512)'; "
        "may be given several times",
    )
    group.add_argument(
        "--max-request-bytes",
        type=_positive,
        default=MAX_BODY,
        help="most bytes of a request's body; above it the answer is 413 (default: 64 MiB)",
    )
    group.add_argument(
        "--max-concurrent-requests",
        type=_positive,
        help="most requests under way in an API process; above it the answer is 429 "
        "(default: no limit)",
    )
    group.add_argument(
        "--prompt-compressor",
        metavar="MODEL",
        help="folder or hub name of a token classifier, for prompt_compression by llmlingua-2",
    )
    group.add_argument(
        "--prompt-compression",
        type=_compression,
        metavar="JSON",
        help="""for requests that do not say, e.g. '{"method": "selective", "rate": 0.5}'""",
    )
    group.add_argument(
        "--log-requests-json",
        action="store_true",
        help="a line of JSON per request on the standard output; nothing of its text",
    )
    group.add_argument(
        "--api-key-file", help="file with the API key, which then shows in no process list"
    )
    parser = serve_parser(parser)
    # vLLM's default, 0, ends running requests when the server is told to stop.
    parser.set_defaults(shutdown_timeout=DRAIN_SECONDS)
    return parser


def configure(args: argparse.Namespace) -> argparse.Namespace:
    """Turn our options into vLLM's, refusing what cannot work before a model is loaded.

    Raises:
        PolicyError: bad policy or kernel, or a conflicting flag.

    """
    if args.model_tag is not None:
        args.model = args.model_tag
    name = args.model
    args.model = args.model_tag = resolve(name)
    if name in MODELS and args.served_model_name is None:
        args.served_model_name = [name]
    if args.dtype == "auto" and (dtype := default_dtype()):
        args.dtype = dtype
    extra: dict[str, Any] = dict(args.additional_config or {})
    refuse_near(extra, (POLICY_KEY, KERNEL_KEY), "--additional-config")
    for key, value in ((POLICY_KEY, args.cache_policy), (KERNEL_KEY, args.cache_kernel)):
        if value is None:
            continue
        if extra.get(key, value) != value:
            raise PolicyError(f"{key} is given twice: {value!r} and in --additional-config")
        extra[key] = value
    if KERNEL_KEY in extra:
        kernel_class(extra[KERNEL_KEY])
        if POLICY_KEY not in extra:
            raise PolicyError("--cache-kernel needs --cache-policy")
    if POLICY_KEY in extra:
        parse(extra[POLICY_KEY])
        refuse_remote_engines(args)
        _choose_backend(args)
    if args.policy_alias:
        if POLICY_KEY not in extra:
            raise PolicyError("--policy-alias needs --cache-policy")
        adapters = [adapter.name for adapter in args.lora_modules or ()]
        parse_aliases(args.policy_alias, [*(args.served_model_name or [args.model]), *adapters])
    default = args.prompt_compression
    if default and default.method == "llmlingua-2" and not args.prompt_compressor:
        raise PolicyError("--prompt-compression by llmlingua-2 needs --prompt-compressor MODEL")
    args.additional_config = extra
    return args


def _choose_backend(args: argparse.Namespace) -> None:
    """On a GPU vLLM is told which backend serves full-attention layers; on a CPU it knows one."""
    from vllm.platforms import current_platform

    if current_platform.is_cuda_alike():
        from cache_policies.vllm_plugin.cuda import choose_backend

        choose_backend(args)


def _compression(text: str) -> PromptCompression:
    try:
        return PromptCompression.of(json.loads(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def default_dtype() -> str | None:
    """float32 on a CPU without native bfloat16 (AVX-512 or AMX); None: vLLM's choice."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or torch.cpu._is_avx512_supported():
        return None
    return "float32"


def run(argv: list[str]) -> None:
    """Parse, check and serve until stopped.

    That the policy is in force is checked in every worker (``PolicyGuard``), which fails the
    start otherwise.
    """
    os.environ["VLLM_PLUGINS"] = ",".join(_plugins())
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(ONEDNN_SHAPES))
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import init_logger
    from vllm.platforms import current_platform

    parser = make_parser()
    utilization = parser.get_default("gpu_memory_utilization")
    parser.set_defaults(gpu_memory_utilization=None)  # to see whether it is given
    args = parser.parse_args(argv)
    on_cpu = current_platform.is_cpu()
    logger = init_logger("vllm.kvthrift.serve")
    if on_cpu:
        # what vLLM chooses itself where Triton finds no GPU, but for a warning
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
        logger.info(choose_threads(len(os.sched_getaffinity(0))))
    else:
        prepare_environment()  # as vLLM's own command does: CUDA does not survive a fork
    for text in misspelt(os.environ):
        logger.warning(text)
    size_cache(args, utilization, on_cpu=on_cpu)
    try:
        args = configure(args)
        _read_key(args)
        refuse_machine(args, on_cpu=on_cpu)
    except OSError as error:
        raise PolicyError(str(error)) from None
    command = ServeSubcommand()
    args.subparser = command.name
    command.validate(args)
    try:
        command.cmd(args)
    except Exception as error:
        why = explain(error, args)
        if why is None:
            raise
        raise SystemExit(f"kvthrift: {why}") from None
    if engine_died() or (args.headless and args.node_rank):  # such a host serves until one dies
        raise SystemExit("kvthrift: the engine died; see the log above")


def _plugins() -> list[str]:
    """Plugins vLLM loads: those it would, and ours.

    Plugins of routes are loaded only by name, and naming one shuts out the others.
    """
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None:
        return list(dict.fromkeys([*filter(None, chosen.split(",")), "kvthrift"]))
    groups = [g for g in entry_points().groups if g.startswith("vllm.")]
    usual = [g for g in groups if g != "vllm.endpoint_plugins"]
    names = {entry.name for group in usual for entry in entry_points(group=group)}
    return sorted(names | {"kvthrift"})


def _read_key(args: argparse.Namespace) -> None:
    """Put the API key where vLLM looks for it.

    Raises:
        PolicyError: the file is empty or cannot be read, or a key is given too.

    """
    path = args.api_key_file
    if path is None:
        return
    if args.api_key:
        raise PolicyError("--api-key and --api-key-file are both given")
    try:
        key = Path(path).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise PolicyError(
            f"--api-key-file {path}: {error.strerror}; write the key into it, readable for this "
            "user, or leave the option out"
        ) from None
    if not key:
        raise PolicyError(f"--api-key-file {path} is empty")
    os.environ["VLLM_API_KEY"] = key
