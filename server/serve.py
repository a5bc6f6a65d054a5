"""``kvthrift serve``: vLLM's own OpenAI server with a cache policy."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from cache_policies.errors import PolicyError
from cache_policies.kernels import KERNELS, kernel_class
from cache_policies.policy import parse
from cache_policies.vllm_plugin.config import KERNEL_KEY, POLICY_KEY
from server.models import MODELS, resolve

if TYPE_CHECKING:
    import argparse


def make_parser() -> argparse.ArgumentParser:
    """VLLM's ``serve`` parser with our options in front."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
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
    return make_arg_parser(parser)


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
    args.additional_config = extra
    return args


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
    # The V2 runner builds no logits processors, hence no guard; it needs Triton anyway.
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    from vllm.entrypoints.cli.serve import ServeSubcommand

    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        args = configure(args)
    except PolicyError as error:
        parser.error(str(error))
    command = ServeSubcommand()
    args.subparser = command.name
    command.validate(args)
    command.cmd(args)
