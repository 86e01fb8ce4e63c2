# shellcheck shell=bash
# Environment of every process of a run, sourced by on_node.sh and by the image's entry point. Variables that are already
# set are kept. docs/cluster.md has a table of all variables with reasons.

# Site-specific setup on every node: module loads, names of network interfaces.
if [ -n "${SDSEARCH_SETUP:-}" ]; then
  case $- in *u*) is_strict=yes ;; *) is_strict='' ;; esac
  set +u # modules and conda read variables that may be unset
  # shellcheck disable=SC1090
  source "$SDSEARCH_SETUP"
  if [ -n "$is_strict" ]; then set -u; fi
fi

if [ -z "${SDSEARCH_PYTHON:-}" ]; then
  if [ -x .venv/bin/python ]; then SDSEARCH_PYTHON=.venv/bin/python; else SDSEARCH_PYTHON=python3; fi
fi
export SDSEARCH_PYTHON
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}"
# Models and data are local folders; nodes without internet access must not wait for the hub.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"

# megatron-core: the order of kernels in which tensor-parallel communication overlaps with compute (Hopper and older).
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# With weight_sync=distributed trainer and SGLang form one NCCL group, which hangs or fails if their values differ
# (NovaSky-AI/SkyRL#143). SGLang sets this for its own processes.
export NCCL_CUMEM_ENABLE="${NCCL_CUMEM_ENABLE:-0}"
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
