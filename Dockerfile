# syntax=docker/dockerfile:1
# The server by default; with other words any verb: docker run eyespot ask ...
#   docker build -t eyespot .                                   CPU
#   docker build -t eyespot:cuda --build-arg VARIANT=cuda .     CUDA; its libraries come with torch, the driver from the host
#   --build-arg EXTRAS=train,quickstart,tracking                what else is in the image; see pyproject.toml
ARG VARIANT=cpu

FROM python:3.12-slim-bookworm AS base
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONDONTWRITEBYTECODE=1
RUN python -m venv /venv
ENV PATH=/venv/bin:$PATH
WORKDIR /source
COPY constraints.txt ./

# 2.13.0+cpu counts as newer than 2.13.0; what torch needs comes from the package index
FROM base AS torch-cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu torch

FROM base AS torch-cuda
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt torch

# hadolint ignore=DL3006
FROM torch-${VARIANT} AS packages
ARG EXTRAS=serve
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt ".[${EXTRAS}]"

FROM python:3.12-slim-bookworm
RUN useradd --uid 10001 --create-home eyespot \
    && install --directory --owner eyespot --group eyespot \
       /home/eyespot/runs /home/eyespot/.cache /home/eyespot/.cache/eyespot
COPY --from=packages /venv /venv
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1
USER 10001
WORKDIR /home/eyespot
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=2m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["eyespot"]
CMD ["serve", "runs/quickstart/model", "--host", "0.0.0.0"]
