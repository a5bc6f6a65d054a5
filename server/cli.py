"""The ``kvthrift`` command."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cache_policies.errors import PolicyError
from loadtest.commands import cli as loadtest_cli
from loadtest.errors import LoadTestError
from server.models import MODELS, ModelError, get_model, model_path

if TYPE_CHECKING:
    from collections.abc import Iterator

    from server.model_shape import ModelShape

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)
model_app = typer.Typer(no_args_is_help=True, help="Small models from PyPI; RWKV files.")
app.add_typer(model_app, name="model")
loadtest_cli.register(app)
console = Console()
errors = Console(stderr=True)

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"
EVERYTHING = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def main() -> None:
    """Entry point; errors a user can mend are one line and an exit status above 0."""
    try:
        app()
    except (PolicyError, ModelError, LoadTestError) as error:
        errors.print(f"[red]kvthrift: {escape(str(error))}[/red]", highlight=False, soft_wrap=True)
        raise SystemExit(getattr(error, "status", 2)) from None


@contextmanager
def metrics_of_all_processes() -> Iterator[None]:
    """Let /metrics show what the engine's processes count (prometheus_client's multiprocess mode).

    prometheus_client looks when it is imported, so nothing may have imported it before.
    """
    if MULTIPROCESS in os.environ:
        yield
        return
    assert "prometheus_client" not in sys.modules, "imported too early to share its metrics"
    with TemporaryDirectory(prefix="kvthrift-metrics-") as folder:
        os.environ[MULTIPROCESS] = folder
        yield


@app.command(context_settings=EVERYTHING, add_help_option=False)
def serve(context: typer.Context) -> None:
    """Serve MODEL over the OpenAI API: --cache-policy P and every flag of vLLM's serve."""
    with metrics_of_all_processes():
        from server.serve import run

        run(context.args)


@app.command()
def policies(
    model: Annotated[str, typer.Option(help="embedded model or model folder")] = "smollm2-135m",
    memory: Annotated[str, typer.Option(help="cache memory, e.g. 512M or 4G")] = "1G",
    tokens: Annotated[int, typer.Option(min=1, help="tokens of a request")] = 8192,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
) -> None:
    """List the policies: what each keeps and loses, its size and capacity."""
    # These import torch, which the other commands need not wait for.
    from cache_policies.pages.codecs import CODECS
    from cache_policies.parameters import parameters
    from cache_policies.policy import parse
    from server.capacity import bytes_by_length, capacity

    shape = _shape(model, dtype)
    size = _bytes(memory)
    title = f"{model}, {dtype}, {memory} of cache, requests of {tokens} tokens"
    if shape.constant_bytes:
        title += f"; {shape.constant_bytes:,} bytes of each in layers that do not grow"
    if not shape.layers:
        title += "; no layer grows: all policies hold the same, and the server takes none"
    table = Table(title=title)
    for heading in (
        "policy",
        "parameters",
        "keeps",
        "loses",
        "bytes of n tokens",
        "requests",
        "x 16 bit",
    ):
        table.add_column(heading, overflow="fold")
    for name, entry in CODECS.items():
        shown = ", ".join(f"{k}={v}" for k, v in parameters(entry.cls, dict(entry.fixed)).items())
        about = (name, shown, entry.cls.keeps, entry.cls.loses)
        try:
            result = capacity(parse(name), shape, size, tokens)
            constant, slope = bytes_by_length(parse(name), shape)
        except PolicyError as error:
            table.add_row(*about, f"[dim]{error}[/dim]", "", "")
            continue
        numbers = (f"{constant:,.0f} + {slope:,.0f} n", str(result.requests), f"{result.ratio:.2f}")
        table.add_row(*about, *numbers)
    console.print(table)
    console.print(
        "First and last layers at another precision: CODEC+layers(first=2,last=2,codec=fp16)",
        markup=False,
    )
    console.print(_methods())


def _methods() -> Table:
    from cache_policies.policy import method_classes

    table = Table(title="with any codec, as METHOD+CODEC; a request may choose METHOD for itself")
    for heading in ("method", "parameters", "keeps", "loses", "prefill"):
        table.add_column(heading, overflow="fold")
    for name, cls in method_classes().items():
        shown = ", ".join(f"{k}={v}" for k, v in cls.settable().items() if k != "prefill")
        table.add_row(name, shown, cls.keeps, cls.loses, ", ".join(cls.PREFILL))
    return table


@model_app.command("list")
def list_models() -> None:
    """List the embedded models."""
    table = Table()
    for heading in ("name", "in the cache", "about"):
        table.add_column(heading)
    for name, model in MODELS.items():
        present = "yes" if (model_path(name) / "config.json").exists() else "no"
        table.add_row(name, present, model.about)
    console.print(table)


@model_app.command("get")
def get(name: str) -> None:
    """Fetch an embedded model into the cache and print its folder."""
    typer.echo(get_model(name))


@model_app.command("path")
def path(name: str) -> None:
    """Print where an embedded model is, or will be."""
    typer.echo(model_path(name))


@model_app.command("convert")
def convert_model(
    file: Annotated[Path, typer.Argument(help="RWKV-5 or RWKV-7 file of its author's, a .pth")],
    folder: Annotated[Path, typer.Argument(help="made, with config.json and safetensors")],
) -> None:
    """Make a folder that `kvthrift serve` takes from an RWKV .pth file; print it."""
    from linear_models.convert import convert

    typer.echo(convert(file, folder))


def _shape(model: str, dtype: str) -> ModelShape:
    import torch

    from server.model_shape import ModelShape

    kind = getattr(torch, dtype, None)
    if kind not in (torch.float32, torch.bfloat16, torch.float16):
        raise PolicyError(f"dtype {dtype!r} is not one of float32, bfloat16, float16")
    folder = get_model(model) if model in MODELS else Path(model)
    if not (folder / "config.json").exists():
        raise ModelError(f"{model!r} is neither one of {', '.join(MODELS)} nor a model folder")
    try:
        return ModelShape.from_folder(folder, kind)
    except (AttributeError, TypeError, ValueError) as error:  # no JSON, no object, or fields lack
        raise ModelError(f"{folder / 'config.json'} describes no model: {error}") from None


def _bytes(text: str) -> int:
    number, unit = text[:-1], text[-1:].upper()
    if unit not in UNITS or not number.isdecimal():
        raise PolicyError(f"memory {text!r} is not a whole number followed by K, M or G")
    return int(number) * UNITS[unit]
