# fwl-export for the CPU: export, check, score, and sessions over ONNX Runtime.
#
#   docker build -f docker/cpu.Dockerfile --build-arg TORCH_INDEX=ADDRESS -t fwl-export:cpu .
#   docker run --rm -v "$PWD:/work" fwl-export:cpu export demo -o demo-bundle
#
# This image has not been built: no Docker engine was available. The file passes hadolint, and the
# commands of its RUN lines were run by hand in fresh environments; see docs/releasing.md.

FROM python:3.12-slim-bookworm AS build

# A compiler and CMake for the C++ kernel; without them the wheel works and is slower.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends cmake g++ ninja-build \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /source
COPY . .
# Address of an index with torch's builds without CUDA, as PyTorch's installation page gives it. Empty:
# pip takes the build of its own index, which brings several GB of CUDA. All other packages are
# checked against the hashes in constraints.txt; of torch any build will do if an address is given.
ARG TORCH_INDEX=""
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . \
    && python tools/install.py --venv /opt/fwl --extras export,cpu \
       --package "$(echo /wheels/fwl_export-*.whl)" ${TORCH_INDEX:+--unhashed torch} \
       -- --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}

FROM python:3.12-slim-bookworm

COPY --from=build /opt/fwl /opt/fwl
RUN useradd --create-home --uid 1000 fwl && mkdir /work && chown fwl:fwl /work
USER 1000
WORKDIR /work
ENV PATH=/opt/fwl/bin:$PATH PYTHONUNBUFFERED=1

# Exits with 1 if a package that sessions need cannot be loaded.
HEALTHCHECK --interval=5m --timeout=30s CMD ["fwl-export", "doctor"]
ENTRYPOINT ["fwl-export"]
CMD ["--help"]
