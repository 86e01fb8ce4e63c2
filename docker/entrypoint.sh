#!/usr/bin/env bash
# Entry point of the image: checks a configuration and trains, or runs any other command.
#
# entrypoint.sh train CONFIG [key=value ...]    train on this machine's GPUs
# entrypoint.sh COMMAND [arguments ...]         any other command of the package: evaluate, --help ...
# entrypoint.sh -- PROGRAM [arguments ...]      any program: bash, python3 tools/index_corpus.py ...
#
#   NUM_TRAINERS             processes of `train`, one per GPU; all GPUs by default. The run's servers get the others
#   SDSEARCH_STOP_TIMEOUT_S  from a signal to the end of the processes, in which they save (600)
set -euo pipefail

# shellcheck source=slurm/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../slurm/env.sh" # as under Slurm

count_gpus() {
  local listed
  if ! listed=$(nvidia-smi --list-gpus) || ! grep --count '^GPU ' <<< "$listed"; then
    echo "no GPU in this container: docker run --gpus all ..., with the NVIDIA container toolkit on the host" >&2
    exit 2
  fi
}

case ${1:-} in
  train)
    num_trainers=${NUM_TRAINERS:-$(count_gpus)}
    code=0
    "$SDSEARCH_PYTHON" -m megatron_sdsearch check "${@:2}" --nproc-per-node "$num_trainers" || code=$?
    if [ "$code" -gt 1 ]; then exit "$code"; fi # 1 is warnings alone: docs/check.md
    # By default SIGUSR1 would kill torchrun; with --signals-to-handle it is forwarded, and the ranks save.
    exec "$SDSEARCH_PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$num_trainers" \
      --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout "${SDSEARCH_STOP_TIMEOUT_S:-600}" \
      -m megatron_sdsearch "$@"
    ;;
  --)
    shift
    exec "$@"
    ;;
  *) exec "$SDSEARCH_PYTHON" -m megatron_sdsearch "$@" ;;
esac
