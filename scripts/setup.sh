#!/usr/bin/env bash
# Creates .venv with vLLM for CPUs, kvthrift (editable) and its tools.
# usage: scripts/setup.sh [python]     (default: python3.11)
#
# constraints.txt names every package with its version, so nothing is resolved: pip only fetches and
# unpacks, from the indexes it is configured for. scripts/lock.py then checks that nothing is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3.11}
torch="torch==2.13.0+cpu"
vision="torchvision==0.28.0+cpu"
torch_index=https://download.pytorch.org/whl/cpu
SECONDS=0
say() { printf 'setup: %4d s  %s\n' "$SECONDS" "$*"; }

[ -x .venv/bin/python ] || { say "a virtual environment of $("$python" --version)"; "$python" -m venv .venv; }
install() { .venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps --no-compile "$@"; }

# In the configured indexes first; PyTorch's own, and for torch only, where they have no CPU build.
torch() { install "$torch" 2>.venv/torch.log || install --extra-index-url "$torch_index" "$torch"; }

say "$torch, and beside it the $(grep -c == constraints.txt) packages of constraints.txt"
torch & other=$!
install --requirement constraints.txt || { kill "$other"; exit 1; }
wait "$other" || { cat .venv/torch.log >&2; exit 1; }
# Code of some models (Qwen3.5) imports torchvision; only a build for the same torch does.
vision() { install "$vision" || install --retries 0 --timeout 15 --extra-index-url "$torch_index" "$vision"; }
vision 2>/dev/null || say "$vision cannot be had: models that import it (Qwen3.5) cannot be served"
say "kvthrift: its kernels are compiled"
install --editable .
say "byte code, so that the first start is not slower than the next"
.venv/bin/python -m compileall -q -j 0 .venv/lib >.venv/compile.log || true # templates are no Python
.venv/bin/python scripts/lock.py
say "done"
