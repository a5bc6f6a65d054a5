#!/usr/bin/env bash
# Creates .venv-next: the Python files of vLLM's next release over the packages of .venv, for the
# tests that run no model. The wheel has 340 MB, most of it for GPUs; 60 MB of it are kept.
set -euo pipefail
cd "$(dirname "$0")/.."
next="vllm==0.33.0"

rm -rf .venv-next
.venv/bin/python -m venv --without-pip .venv-next
site=$(.venv-next/bin/python -c 'import site; print(site.getsitepackages()[0])')
base=$(.venv/bin/python -c 'import site; print(site.getsitepackages()[0])')
echo "setup: Python files of $next"
.venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps \
  --dest .venv-next/wheel "$next"
.venv/bin/python - .venv-next/wheel/vllm-*.whl "$site" <<'PYTHON'
import sys
import zipfile

with zipfile.ZipFile(sys.argv[1]) as wheel:
    wanted = [n for n in wheel.namelist() if n.endswith(".py") or ".dist-info/" in n]
    wheel.extractall(sys.argv[2], wanted)
PYTHON
rm -r .venv-next/wheel
# After those of .venv-next itself, and with the .pth files of .venv: kvthrift is one of them.
echo "import site; site.addsitedir('$base')" > "$site/base.pth"
.venv-next/bin/python -c "import vllm; assert f'vllm=={vllm.__version__}' == '$next', vllm"
echo "setup: done"
