# An image with the command mrjax, for a CPU (the default) or for NVIDIA's GPUs; docs/docker.md says how it is run.
#
#     docker build --target cpu --tag mrjax .
#     docker build --target cuda --tag mrjax:cuda .
FROM python:3.13-slim AS base
# The compiler is for the convolutions on a CPU, which are compiled for the machine at hand on first use.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/mrjax
COPY . .
RUN pip install --no-cache-dir '.[demo,export,io,onnx]'
# Any user can run it (docker run --user), so that files in a mounted folder belong to who started it.
ENV HOME=/tmp GLIBC_TUNABLES=glibc.malloc.hugetlb=1
WORKDIR /mnt
ENTRYPOINT ["mrjax"]
CMD ["--help"]

# CUDA's libraries come with JAX; the host gives the driver.
FROM base AS cuda
RUN pip install --no-cache-dir 'jax[cuda12]'
USER 1000

FROM base AS cpu
USER 1000
