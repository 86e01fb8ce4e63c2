# shellcheck shell=bash
# Environment of every process of a run: on_node.sh sources it, and whatever else starts one, e.g. an image's entry.
# What is set already stays as it is. One table of all variables, with reasons: docs/cluster.md.

# What a site needs before anything else: module loads, an interface's name. Runs on every node.
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
# Models and data are local folders; a node without a way out must not wait for the hub.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"

# megatron-core: the order of kernels in which tensor-parallel communication overlaps with compute (Hopper and older).
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# Trainer and SGLang form one NCCL group with weight_sync=distributed. SGLang sets this for its own processes; where the
# two differ, the group hangs or fails (NovaSky-AI/SkyRL#143).
export NCCL_CUMEM_ENABLE="${NCCL_CUMEM_ENABLE:-0}"
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
