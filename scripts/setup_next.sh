#!/usr/bin/env bash
# Creates .venv-next: the Python files of vLLM's next release, with the compiled files of .venv's
# vLLM for CPUs, over the packages of .venv. PyPI has no such release for CPUs. Of the wheel's
# 340 MB, most for GPUs, 60 MB are kept.
set -euo pipefail
cd "$(dirname "$0")/.."
next="vllm==0.33.0"
# What its server needs and that of .venv did not, and the Triton of its torch for CUDA.
beside=("orjson==3.13.0" "triton==3.8.0")

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
    wanted = [n for n in wheel.namelist() if n.endswith((".py", ".jinja")) or ".dist-info/" in n]
    wheel.extractall(sys.argv[2], wanted)
PYTHON
rm -r .venv-next/wheel
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
  --target "$site" "${beside[@]}"
# Of one release the extensions, of another what calls them: the operators that our tests need did
# not change, and a test that calls one that did fails by its name.
ln -s "$base"/vllm/*.so "$site/vllm/"
# By its version vLLM knows that it was built for CPUs; so is one that is built from its sources.
version=${next#vllm==}
mv "$site/vllm-$version.dist-info" "$site/vllm-$version+cpu.dist-info"
sed -i "s/^Version: $version\$/Version: $version+cpu/" "$site/vllm-$version+cpu.dist-info/METADATA"
# After those of .venv-next itself, and with the .pth files of .venv: kvthrift is one of them.
echo "import site; site.addsitedir('$base')" > "$site/base.pth"
.venv-next/bin/python -c "
import vllm
from vllm.platforms import current_platform
assert f'vllm=={vllm.__version__}' == '$next', vllm
assert current_platform.is_cpu(), current_platform"
echo "setup: done"
