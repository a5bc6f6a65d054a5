#!/usr/bin/env bash
# Creates .venv with vLLM for CPUs, kvthrift (editable) and its tools, all pinned.
# usage: scripts/setup.sh [python]     (default: python3.11)
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3.11}
torch="torch==2.13.0+cpu"
vision="torchvision==0.28.0+cpu"
torch_index=https://download.pytorch.org/whl/cpu

[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt)

echo "setup: torch for CPUs"
# The configured indexes first; PyTorch's own only where they have no CPU build.
"${pip[@]}" "$torch" 2>.venv/torch.log \
  || "${pip[@]}" --extra-index-url "$torch_index" "$torch" \
  || { cat .venv/torch.log >&2; exit 1; }
echo "setup: vLLM, kvthrift and tools (a few minutes)"
"${pip[@]}" --editable ".[cpu,dev]"
# They do not import beside a CPU build of torch, and transformers trips over them.
.venv/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
# Code of some models (Qwen3.5) imports torchvision; a build for CPUs is none of these.
"${pip[@]}" --no-deps "$vision" 2>/dev/null \
  || "${pip[@]}" --no-deps --retries 0 --timeout 15 --extra-index-url "$torch_index" "$vision" \
    2>/dev/null \
  || echo "setup: $vision cannot be had; models that import torchvision (Qwen3.5) cannot be served"
echo "setup: done"
