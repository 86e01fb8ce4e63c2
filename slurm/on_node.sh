#!/usr/bin/env bash
# on_node.sh ROLE ... (prepare, serve or train): started by srun once on each node; not for use by hand.
#
# Every role ends in `exec`, because Slurm sends signals to this process (with cgroups only to this one). torchrun
# forwards SIGUSR1 to its ranks, which save and stop (docs/checkpoints.md).
set -euo pipefail

# shellcheck disable=SC1091  # pre-commit checks files one at a time
source slurm/env.sh
role=$1
shift

case $role in
  prepare)
    trap '' USR1 # nothing to save yet
    exec "$SDSEARCH_PYTHON" slurm/prepare.py "$@"
    ;;
  serve) # FOLDER ADDRESS... -- CONFIG [key=value ...]
    folder=$1
    shift
    addresses=()
    while [ "$1" != -- ]; do addresses+=("$1"); shift; done
    shift
    index=$SLURM_PROCID
    trap '' USR1 # the ranks may need the servers until they have saved
    exec "$SDSEARCH_PYTHON" -m megatron_sdsearch serve --index "$index" --host "${addresses[index]}" \
      --urls-file "$folder/urls.$index" --log-dir "$folder/sglang_$SLURMD_NODENAME" "$@"
    ;;
  train) # FOLDER HOST PORT RANKS CONFIG [key=value ...]
    folder=$1 host=$2 port=$3 ranks=$4
    shift 4
    # No elastic restarts: a run that lost a rank continues from its checkpoint in a new or requeued job.
    exec "$SDSEARCH_PYTHON" -m torch.distributed.run --nnodes "$SLURM_STEP_NUM_NODES" --node-rank "$SLURM_PROCID" \
      --master-addr "$host" --master-port "$port" --nproc-per-node "$ranks" --max-restarts 0 \
      --rdzv-id "$SLURM_JOB_ID" --log-dir "$folder/ranks_$SLURMD_NODENAME" --redirects 3 --tee 3 \
      --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout "$SDSEARCH_STOP_TIMEOUT_S" \
      -m megatron_sdsearch train "$@"
    ;;
  *)
    echo "on_node.sh: unknown role $role" >&2
    exit 2
    ;;
esac
