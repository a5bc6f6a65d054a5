# make demo    compare five policies on the embedded model: quality, speed, memory; a report
# make test    all tests            make lint    ruff and mypy
# make test-triton-all   every Triton kernel interpreted and compiled for four targets (hours)
# make gpu-check         the Triton kernels on a GPU: tests, speed, graphs (8 minutes)
# make gpu-engine        a vLLM engine on a GPU beside stock vLLM
# make test-vllm-next   scheduler, engines and a server on the Python files of vLLM's next release
# make test-sanitizers   kernel tests under AddressSanitizer and UBSan (GCC; a build of its own)
# make deploy-test   builds the image and runs the compose file; needs Docker or podman
# make setup   creates .venv; the others call it when needed
PYTHON ?= python3.11
sources := pyproject.toml constraints.txt CMakeLists.txt scripts/setup.sh \
           $(wildcard $(foreach src,cache_policies/kernels/src linear_models/scans/src,$(src)/*.* $(src)/*/*))
# With GPU_PYTHON of your own no environment is made: it needs torch, Triton, pytest, hypothesis,
# numpy and transformers; for gpu-engine also vLLM and this project.
GPU_PYTHON ?= .venv/bin/python
# Nothing is sent out, and models come from the cache only; but on a GPU machine, whose cache is empty.
export HF_HUB_OFFLINE := $(if $(filter .venv/%,$(GPU_PYTHON)),1,0)
export VLLM_NO_USAGE_STATS := 1

.PHONY: setup demo test test-triton-all gpu-check gpu-engine test-sanitizers test-vllm-next \
        lint deploy-test
setup: .venv/.ready

.venv/.ready: $(sources)
	scripts/setup.sh $(PYTHON)
	touch $@

demo: setup
	.venv/bin/kvthrift compare smollm2-135m --out demo-results \
		--policy fp16 --policy kivi-4bit --policy kivi-2bit \
		--policy 'snapkv(budget=512)' --policy 'streaming-llm(window=508)' \
		--workload 'passkey(lengths=400|1600)' --memory 256M \
		--max-model-len 4096 --max-num-batched-tokens 1024 --enforce-eager

test: setup
	scripts/test.sh

test-triton-all: setup
	TRITON_CHECKS=all .venv/bin/python -m pytest -k triton
	.venv/bin/python -m tests.kernels.triton.matrix triton-matrix.jsonl

gpu-check gpu-engine: $(if $(filter .venv/%,$(GPU_PYTHON)),setup)
	$(GPU_PYTHON) -m benchmarks.$(subst -,_,$@)

.venv-next/.ready: scripts/setup_next.sh .venv/.ready
	scripts/setup_next.sh
	touch $@

test-vllm-next: .venv-next/.ready
	.venv-next/bin/python -m pytest tests/scheduling
	.venv-next/bin/python -m pytest -m next tests/cache_policies tests/server tests/engine
	.venv-next/bin/python -m pytest -k triton tests/kernels

test-sanitizers: setup
	scripts/test_sanitizers.sh

deploy-test: setup
	.venv/bin/python -m pytest -s --timeout 1200 deploy/tests

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
