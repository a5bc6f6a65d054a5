#!/usr/bin/env bash
# All tests. Those that start engines run beside the others, for starting one keeps a single core
# busy; what they print is shown at the end.
set -uo pipefail
cd "$(dirname "$0")/.."
log=$(mktemp)
trap 'kill %1 2>/dev/null; rm -f "$log"' EXIT

.venv/bin/python -m pytest tests/engine >"$log" 2>&1 &
.venv/bin/python -m pytest --ignore tests/engine
others=$?
echo "test: waiting for the tests that start engines"
wait %1
engines=$?
cat "$log"
[ "$others" = 0 ] && [ "$engines" = 0 ]
