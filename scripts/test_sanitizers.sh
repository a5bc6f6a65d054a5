#!/usr/bin/env bash
# Runs the kernel tests with the extensions built under AddressSanitizer and UBSan.
# usage: scripts/test_sanitizers.sh [pytest's arguments]     (default: those of kernels and scans)
set -euo pipefail
cd "$(dirname "$0")/.."
home=build/sanitizers
export CXX=g++

# An environment of its own, so that the usual one keeps the usual extension. It sees the packages
# of the usual one, but not its editable install: a .pth file found through another is not read.
if [ ! -x $home/venv/bin/python ]; then
  .venv/bin/python -m venv --without-pip $home/venv
  site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  echo "$site" >"$(echo $home/venv/lib/python3*/site-packages)/parent.pth"
fi
# pip would find kvthrift in the usual environment and take it away from there.
.venv/bin/python -m pip --python $home/venv/bin/python install --quiet --disable-pip-version-check \
  --no-deps --ignore-installed --editable . \
  --config-settings=cmake.define.SANITIZE=ON --config-settings=build-dir=$home/cmake

[ $# != 0 ] || set -- tests/kernels tests/linear_models

# Both runtimes must be loaded before Python; libstdc++ too, for its exceptions to be seen.
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
# Python itself frees nothing at its end.
export LD_PRELOAD ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
exec $home/venv/bin/python -m pytest "$@"
