# Three images from one file: operator and router without torch, the engine with it. `make images`
# builds them; docs/images.md says what is in them, how large they are, and which arguments there are.
#
# Layers are ordered by how seldom they change: system packages and the user, then dependencies (they
# change with the lists in pyproject.toml and the pins), then the wheel, then labels. An edit of the
# sources or of README.md makes the last two anew. Every package comes by its pin and hashes.
ARG BASE=python:3.12.12-slim-bookworm@sha256:593bd06efe90efa80dc4eee3948be7c0fde4134606dd40d8dd8dbcade98e669c
ARG ENGINE_BASE=${BASE}

FROM ${BASE} AS wheel
WORKDIR /src
COPY constraints.txt ./
RUN sed -n '/^uv==/,/[^\\]$/p' constraints.txt | pip install --no-cache-dir --require-hashes -r /dev/stdin
COPY pyproject.toml README.md LICENSE ./
COPY operator operator
COPY engine engine
COPY kernels kernels
COPY e2e/tandem_local e2e/tandem_local
RUN uv build --no-cache --wheel --build-constraint constraints.txt --out-dir /dist

# The lists of dependencies, without what else is in pyproject.toml. Their times are fixed, because
# some builders compare those too.
FROM ${BASE} AS requirements
WORKDIR /requirements
COPY .ci/requirements.py .ci/install-requirements.sh pyproject.toml ./
ARG ROUTER_EXTRAS=demo
ARG ENGINE_EXTRAS=engine,gpu,nixl,mooncake,demo
RUN python requirements.py "" < pyproject.toml > base.txt \
    && python requirements.py "${ROUTER_EXTRAS}" < pyproject.toml > router.txt \
    && python requirements.py "${ENGINE_EXTRAS}" < pyproject.toml > engine.txt \
    && touch -d @0 ./*

# HOME and the caches are a folder that every user can write, whoever the pod runs as. With a
# read-only root, mount a volume there (the operator names another folder, in its own volume).
FROM ${BASE} AS base
RUN groupadd --gid 65532 tandem \
    && useradd --uid 65532 --gid 65532 --no-log-init --no-create-home --home-dir /var/cache/tandem \
        --shell /usr/sbin/nologin tandem \
    && install -d -m 1777 /var/cache/tandem && python -m venv /opt/tandem
ENV PATH=/opt/tandem/bin:$PATH PYTHONUNBUFFERED=1 LANG=C.UTF-8 \
    HOME=/var/cache/tandem TANDEM_CACHE_DIR=/var/cache/tandem XDG_CACHE_HOME=/var/cache/tandem/xdg \
    HF_HOME=/var/cache/tandem/huggingface
COPY --from=requirements /requirements/install-requirements.sh /requirements/base.txt /opt/tandem/requirements/
COPY constraints.txt /opt/tandem/requirements/
RUN sh /opt/tandem/requirements/install-requirements.sh base.txt constraints.txt

FROM base AS operator
COPY --from=wheel /dist /opt/tandem/dist
RUN pip install --no-cache-dir --no-index --no-deps /opt/tandem/dist/*.whl && pip check
USER 65532:65532
EXPOSE 8080 9090
ENTRYPOINT ["tandem-operator"]
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="tandem-operator" \
    org.opencontainers.image.description="Kubernetes operator for prefill/decode-disaggregated LLM inference" \
    org.opencontainers.image.source="https://github.com/tandem-inference/tandem" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"

FROM base AS router
COPY --from=requirements /requirements/router.txt /opt/tandem/requirements/
RUN sh /opt/tandem/requirements/install-requirements.sh router.txt constraints.txt
COPY --from=wheel /dist /opt/tandem/dist
RUN pip install --no-cache-dir --no-index --no-deps /opt/tandem/dist/*.whl && pip check
USER 65532:65532
EXPOSE 8000
ENTRYPOINT ["tandem-router"]
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="tandem-router" \
    org.opencontainers.image.description="Router of Tandem: OpenAI-compatible HTTP in, tokens to workers and back" \
    org.opencontainers.image.source="https://github.com/tandem-inference/tandem" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"

# The engine needs no CUDA base image: the container toolkit mounts the driver, and torch brings its
# own CUDA libraries. Triton compiles what launches a kernel with a C compiler, when it first runs.
FROM ${ENGINE_BASE} AS engine
# Mooncake's transfer engine is linked with libibverbs, which finds its cards by the providers.
RUN apt-get update && apt-get install --yes --no-install-recommends \
        gcc libc6-dev libibverbs1 ibverbs-providers \
    && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 65532 tandem \
    && useradd --uid 65532 --gid 65532 --no-log-init --no-create-home --home-dir /var/cache/tandem \
        --shell /usr/sbin/nologin tandem \
    && install -d -m 1777 /var/cache/tandem && python -m venv /opt/tandem
ENV PATH=/opt/tandem/bin:$PATH PYTHONUNBUFFERED=1 LANG=C.UTF-8 \
    HOME=/var/cache/tandem TANDEM_CACHE_DIR=/var/cache/tandem XDG_CACHE_HOME=/var/cache/tandem/xdg \
    HF_HOME=/var/cache/tandem/huggingface TRITON_CACHE_DIR=/var/cache/tandem/triton \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/tandem/inductor CUDA_CACHE_PATH=/var/cache/tandem/cuda
COPY --from=requirements /requirements/install-requirements.sh /requirements/engine.txt /opt/tandem/requirements/
COPY constraints.txt constraints-gpu.txt /opt/tandem/requirements/
ARG ENGINE_EXTRAS=engine,gpu,nixl,mooncake,demo
RUN case ",${ENGINE_EXTRAS}," in *,gpu,*) pins=constraints-gpu.txt;; *) pins=constraints.txt;; esac \
    && sh /opt/tandem/requirements/install-requirements.sh engine.txt "$pins"
COPY --from=wheel /dist /opt/tandem/dist
RUN pip install --no-cache-dir --no-index --no-deps /opt/tandem/dist/*.whl && pip check
USER 65532:65532
EXPOSE 8100 8101 8998
ENTRYPOINT ["tandem-worker"]
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="tandem-engine" \
    org.opencontainers.image.description="Worker of Tandem: prefill or decode, with KV hand-off" \
    org.opencontainers.image.source="https://github.com/tandem-inference/tandem" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
