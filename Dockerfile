# The router and the Ollama that it runs, in one image. The first line prints an access key, once:
#   docker run --rm -v llamayard:/var/lib/llamayard llamayard keys create me
#   docker run --gpus all -v llamayard:/var/lib/llamayard -p 127.0.0.1:11434:11434 llamayard
# At least 0.30: older versions do not split a model's layers by GPU memory.
ARG OLLAMA_VERSION=0.34.0
ARG PYTHON_VERSION=3.13

FROM ollama/ollama:${OLLAMA_VERSION} AS ollama

FROM python:${PYTHON_VERSION}-slim AS build
WORKDIR /source
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY requirements.lock ./
RUN python -m venv /opt/llamayard && /opt/llamayard/bin/pip install --require-hashes -r requirements.lock
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY router ./router
RUN /opt/llamayard/bin/pip install --no-deps .

FROM python:${PYTHON_VERSION}-slim
# The server with its CUDA libraries, where it looks for them.
COPY --from=ollama /usr/bin/ollama /usr/bin/ollama
COPY --from=ollama /usr/lib/ollama /usr/lib/ollama
COPY --from=build /opt/llamayard /opt/llamayard
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/llamayard llamayard \
 && install -d -o llamayard -g llamayard /var/lib/llamayard/models /var/lib/llamayard/state
# The driver's compute and utility (NVML) libraries are put in by the NVIDIA container toolkit.
ENV PATH=/opt/llamayard/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# Not as variables, which would take precedence over a file that a user mounts here.
COPY deploy/container.yaml /etc/llamayard/config.yaml
USER llamayard
WORKDIR /var/lib/llamayard
VOLUME /var/lib/llamayard
EXPOSE 11434
# Override it if you change server.port or use TLS.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:11434/health', timeout=4)"]
# SIGTERM drains; docker stop must wait longer than server.drain_timeout_seconds (-t 60).
STOPSIGNAL SIGTERM
ENTRYPOINT ["llamayard"]
CMD ["serve"]
