# fwl-export for NVIDIA GPUs: TensorRT engines, and ONNX Runtime with CUDA.
#
#   docker build -f docker/nvidia.Dockerfile -t fwl-export:nvidia .
#   docker run --rm --gpus all -v "$PWD:/work" fwl-export:nvidia build demo-bundle
#
# This image has not been built, and nothing in it was run on a GPU: no Docker engine and no NVIDIA
# machine were available. The file passes hadolint; see docs/releasing.md.

FROM nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04 AS build

# Ubuntu 24.04 has Python 3.12. The compiler and CMake are for the C++ kernels.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends cmake g++ ninja-build python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /source
COPY . .
RUN python3 -m venv /opt/fwl && /opt/fwl/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# The extra `gpu` is not among the packages that constraints.txt pins, so its releases follow
# pyproject.toml's lower bounds; everything both have in common is pinned, with hashes.
RUN python3 tools/install.py --venv /opt/fwl --extras export,gpu \
    --package "$(echo /wheels/fwl_export-*.whl)" -- --no-cache-dir

FROM nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/fwl /opt/fwl
# Ubuntu's image has a user with the number 1000 already.
RUN useradd --create-home --uid 1001 fwl && mkdir /work && chown fwl:fwl /work
USER 1001
WORKDIR /work
ENV PATH=/opt/fwl/bin:$PATH PYTHONUNBUFFERED=1

# Exits with 1 if a package that sessions need cannot be loaded.
HEALTHCHECK --interval=5m --timeout=30s CMD ["fwl-export", "doctor"]
ENTRYPOINT ["fwl-export"]
CMD ["--help"]
