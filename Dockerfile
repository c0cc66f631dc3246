# Three images from one file: operator and router without torch, the engine with it.
#   docker build --target operator -t ghcr.io/tandem-inference/tandem-operator:0.1.0 .
#   docker build --target router   -t ghcr.io/tandem-inference/tandem-router:0.1.0 .
#   docker build --target engine   -t ghcr.io/tandem-inference/tandem-engine:0.1.0 .
# The engine needs no CUDA base image: the container toolkit mounts the driver, and torch brings its
# own CUDA libraries. ENGINE_EXTRAS chooses the transports, for example "engine,gpu,nixl".
# Every package comes by its pin and hashes (`make pins`).
ARG BASE=python:3.12-slim
ARG ENGINE_BASE=${BASE}

FROM ${BASE} AS wheel
WORKDIR /src
RUN pip install --no-cache-dir build
COPY pyproject.toml README.md LICENSE ./
COPY operator operator
COPY engine engine
COPY kernels kernels
COPY e2e/tandem_local e2e/tandem_local
RUN python -m build --wheel --outdir /dist

FROM ${BASE} AS base
RUN python -m venv /opt/tandem
ENV PATH=/opt/tandem/bin:$PATH PYTHONUNBUFFERED=1
COPY --from=wheel /dist /dist
COPY constraints.txt /dist/
RUN sed -n '/^uv==/,/[^\\]$/p' /dist/constraints.txt | pip install --no-cache-dir -r /dev/stdin \
    && uv pip install --no-cache --python /opt/tandem/bin/python -c /dist/constraints.txt /dist/*.whl \
    && pip uninstall --yes uv && rm -r /dist

FROM base AS operator
USER 65532:65532
EXPOSE 8080 9090
ENTRYPOINT ["tandem-operator"]

FROM base AS router
USER 65532:65532
EXPOSE 8000
ENTRYPOINT ["tandem-router"]

FROM ${ENGINE_BASE} AS engine
ARG ENGINE_EXTRAS=engine,gpu
RUN python -m venv /opt/tandem
ENV PATH=/opt/tandem/bin:$PATH PYTHONUNBUFFERED=1 TANDEM_CACHE_DIR=/var/cache/tandem
COPY --from=wheel /dist /dist
COPY constraints.txt constraints-gpu.txt /dist/
RUN set -- /dist/*.whl \
    && case "${ENGINE_EXTRAS}" in *gpu*) pins=/dist/constraints-gpu.txt;; *) pins=/dist/constraints.txt;; esac \
    && sed -n '/^uv==/,/[^\\]$/p' "$pins" | pip install --no-cache-dir -r /dev/stdin \
    && uv pip install --no-cache --python /opt/tandem/bin/python -c "$pins" "$1[${ENGINE_EXTRAS}]" \
    && pip uninstall --yes uv && rm -r /dist \
    && install -d -o 65532 -g 65532 /var/cache/tandem
USER 65532:65532
EXPOSE 8100 8101 8998
ENTRYPOINT ["tandem-worker"]
