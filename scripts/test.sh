#!/usr/bin/env bash
# All tests, in two halves side by side: those that run engines in programs of their own, and the
# others, which start servers. Starting either keeps a single core busy. What the first half prints
# is shown at the end.
set -uo pipefail
cd "$(dirname "$0")/.."
# Threads that wait would spin, and take the cores from the other half: beside it five tests of
# attention mass took 23 s, or over 60 s, instead of 6.5 s.
export OMP_WAIT_POLICY=passive
log=$(mktemp)
trap 'kill %1 2>/dev/null; rm -f "$log"' EXIT

programs=$(grep -lw program tests/engine/test_*.py)
.venv/bin/python -m pytest $programs >"$log" 2>&1 &
.venv/bin/python -m pytest ${programs//tests/--ignore=tests}
others=$?
echo "test: waiting for the tests that run engines"
wait %1
engines=$?
cat "$log"
[ "$others" = 0 ] && [ "$engines" = 0 ]
