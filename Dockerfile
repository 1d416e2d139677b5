# The server without models: mount a family at /models and a writable volume at /data.
#
#   docker build -t eda-server --build-arg TORCH_INDEX=... .     # the CPU image: an index with torch's CPU wheels
#   docker build -t eda-server:cuda .                            # the default index holds CUDA wheels
#   docker build -t eda-server --build-arg COMPILER= .           # smaller; CPUs compute with torch alone
#   docker run --stop-timeout 45 -p 8000:8000 -e EDA_ADMIN_KEY=... -v "$PWD/models:/models:ro" -v eda-data:/data eda-server
#
# Docker kills ten seconds after SIGTERM unless told otherwise; running requests get EDA_DRAIN_SECONDS (30), and the worker
# some more to save its state. podman and buildah keep the health check only with --format docker.
# Nothing is downloaded at run time; for EDA_ALLOW_HUB=true give -e HF_HUB_OFFLINE=0 as well.
# It listens on all addresses of the container, so it does not start without EDA_ADMIN_KEY or EDA_ADMIN_KEY_FILE.

ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
# Which package index torch comes from; empty takes pip's default, whose Linux wheels bring CUDA (several GB).
ARG TORCH_INDEX=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/eda
WORKDIR /src
COPY constraints.txt pyproject.toml ./
# First and alone, so that a change of the project does not download it again. What it depends on comes below.
RUN /opt/eda/bin/pip install --no-deps -c constraints.txt ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} torch
COPY README.md LICENSE ./
COPY eda eda
COPY adapters adapters
COPY server server
RUN /opt/eda/bin/pip install -c constraints.txt . && /opt/eda/bin/eda --help > /dev/null

FROM python:${PYTHON}-slim
# The passes for CPUs are compiled on the machine that runs them, once, and kept in /data.
ARG COMPILER=g++
RUN if [ -n "${COMPILER}" ]; then \
        apt-get update && apt-get install -y --no-install-recommends ${COMPILER} && rm -rf /var/lib/apt/lists/*; \
    fi
RUN useradd --system --uid 10001 --create-home eda && install -d -o eda -g eda /data /models
COPY --from=build /opt/eda /opt/eda
ENV PATH=/opt/eda/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    XDG_CACHE_HOME=/data/.cache \
    EDA_HOST=0.0.0.0 \
    EDA_PORT=8000 \
    EDA_MODELS_DIR=/models \
    EDA_DATA_DIR=/data \
    EDA_LOG_FORMAT=json
USER eda
WORKDIR /data
VOLUME ["/models", "/data"]
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['EDA_PORT'] + '/health', timeout=4)"]
ENTRYPOINT ["eda"]
CMD ["serve"]
