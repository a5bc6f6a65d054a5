# make demo    serve the embedded model under several policies, measure, print the table
# make test    all tests            make lint    ruff and mypy
# make setup   creates .venv; the others call it when needed
PYTHON ?= python3.11
sources := pyproject.toml constraints.txt CMakeLists.txt scripts/setup.sh \
           $(wildcard cache_policies/kernels/src/*)
# Nothing is sent out, and models come from the cache only.
export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1

.PHONY: setup demo test lint
setup: .venv/.ready

.venv/.ready: $(sources)
	scripts/setup.sh $(PYTHON)
	touch $@

demo: setup
	.venv/bin/python -m loadtest.demo

test: setup
	.venv/bin/python -m pytest

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
