# syntax=docker/dockerfile:1
# Training and sampling in one image: SGLang's own image plus what docker/install.sh adds. docs/docker.md shows how to
# build and run it. Linted but never built: no machine of this project has a docker engine.

# SGLang 0.5.21 on CUDA 13.0, Python 3.12, torch 2.13.0; with compilers, which transformer-engine needs to build.
ARG BASE=lmsysorg/sglang:v0.5.21-cu130@sha256:b1259f3ea3275f66237c498ea388919729018bc9f01c3d638391e06e2cf3f469
FROM ${BASE}

# NVIDIA's apex, optional: megatron-core uses its fused kernels if installed.
ARG WITH_APEX=false
# Concurrent compilers; each takes up to 4 GB.
ARG MAX_JOBS=8
ENV PYTHONDONTWRITEBYTECODE=1

# Ordered by how rarely a layer changes, so that a changed source file rebuilds only the last layers.
WORKDIR /opt/sdsearch
COPY constraints.txt pyproject.toml ./
COPY docker/install.sh docker/requirements.txt docker/
RUN docker/install.sh libraries
# A separate layer, so that the libraries above are built once, with or without apex.
# hadolint ignore=DL3059
RUN if [ "$WITH_APEX" = true ]; then docker/install.sh apex; fi
COPY LICENSE README.md ./
COPY megatron_sdsearch megatron_sdsearch
RUN docker/install.sh package
COPY docker/entrypoint.sh docker/
COPY tools tools
COPY examples examples
COPY slurm/env.sh slurm/

# By number, because a name would have to exist in the base. Group 0 can write to $HOME, so `--user $(id -u):0` works too.
ENV HOME=/home/trainer USER=trainer
RUN install --directory --owner=1000 --group=0 --mode=2775 /home/trainer /runs
USER 1000:0
WORKDIR /opt/sdsearch

# Containers can lose their GPUs at run time while their processes still look healthy.
HEALTHCHECK --interval=60s --timeout=30s --start-period=30s --retries=3 CMD ["nvidia-smi", "--list-gpus"]
ENTRYPOINT ["/opt/sdsearch/docker/entrypoint.sh"]
CMD ["--help"]
