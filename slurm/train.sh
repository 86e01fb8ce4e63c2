#!/usr/bin/env bash
#SBATCH --job-name=sdsearch
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600
#
# Runs one torchrun per node, and SGLang servers on the last SDSEARCH_SGLANG_NODES nodes, or on all nodes with
# rollout.sglang.colocated.
#
# sbatch [sbatch's flags] slurm/train.sh CONFIG [key=value ...]
#
# Set account, partition, nodes and time by sbatch's flags or SBATCH_* variables. Submit it
# from the root of this repository. Settings: docs/cluster.md.
#
# Exit codes: 0 trained; 1 failed, with the cause in the last line; 2 wrong input; 143 ended by scancel.
set -euo pipefail

die() {
  local code=$1
  shift
  echo "train.sh: $*" >&2
  exit "$code"
}

[ -n "${SLURM_JOB_ID:-}" ] || die 2 "not in a Slurm job: submit it with sbatch slurm/train.sh CONFIG [key=value ...]"
[ $# -ge 1 ] || die 2 "no CONFIG: sbatch slurm/train.sh CONFIG [key=value ...]"
[ -f slurm/on_node.sh ] || die 2 "$PWD is not the root of the repository: submit from there, or add sbatch --chdir"

: "${SDSEARCH_SGLANG_NODES:=0}"
: "${SDSEARCH_REQUEUE:=signal}" # never | signal: after SIGUSR1 | failure: after a failure, too
: "${SDSEARCH_MAX_STALLED_STARTS:=3}"
export SDSEARCH_STOP_TIMEOUT_S="${SDSEARCH_STOP_TIMEOUT_S:-540}" # less than in --signal above

case $SDSEARCH_REQUEUE in
  never | signal | failure) ;;
  *) die 2 "SDSEARCH_REQUEUE: $SDSEARCH_REQUEUE is not one of never, signal, failure" ;;
esac
for name in SDSEARCH_SGLANG_NODES SDSEARCH_MAX_STALLED_STARTS SDSEARCH_STOP_TIMEOUT_S; do
  [[ ${!name} =~ ^[0-9]+$ ]] || die 2 "$name: ${!name} is not a number"
done

# srun of Slurm 23.11 reads these and would give the one task of a node only one rank's share of the cores.
unset SLURM_CPUS_PER_TASK SRUN_CPUS_PER_TASK SLURM_TRES_PER_TASK
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
restart=${SLURM_RESTART_COUNT:-0}
is_requested='' serve_pid='' train_pid=''

container=()
if [ -n "${SDSEARCH_CONTAINER_IMAGE:-}" ]; then
  export SDSEARCH_PYTHON="${SDSEARCH_PYTHON:-python3}" # the image's, not .venv's
  container=(--container-image="$SDSEARCH_CONTAINER_IMAGE" --container-workdir="$PWD" --no-container-mount-home
    --container-mounts="$PWD:$PWD${SDSEARCH_CONTAINER_MOUNTS:+,$SDSEARCH_CONTAINER_MOUNTS}")
fi

# on_nodes STEP NODE... -- ROLE ...: run on_node.sh once on each node. Call it in a subshell, which becomes srun: with
# `&`, $! is then the id of srun, which forwards signals to its tasks.
on_nodes() {
  local step=$1 on=()
  shift
  while [ "$1" != -- ]; do on+=("$1"); shift; done
  shift
  # --overlap: steps share the nodes' GPUs and memory. No binding: a node's one task spreads over all of its cores.
  exec srun --quiet --job-name="$step" --nodes="${#on[@]}" --ntasks="${#on[@]}" --ntasks-per-node=1 \
    --nodelist="$(IFS=,; echo "${on[*]}")" --overlap --cpu-bind=none --kill-on-bad-exit=1 "${container[@]}" \
    bash slurm/on_node.sh "$@" < /dev/null
}

address_of() {
  scontrol show node "$1" --oneliner | sed -E 's/.* NodeAddr=([^ ]+).*/\1/'
}

# end_step STEP PID SECONDS: send SIGTERM to all processes of a step, and SIGKILL after SECONDS.
end_step() {
  local id waited
  id=$(squeue --steps --noheader --jobs="$SLURM_JOB_ID" --format='%i %j' | awk -v name="$1" '$2 == name { print $1 }') \
    || id='' # the controller does not answer: srun forwards the signal
  # Slurm 22.05 signals the step but also reports that it does not exist.
  [ -z "$id" ] || scancel --signal=TERM "$id" 2> /dev/null || true
  for ((waited = 0; waited < $3; waited++)); do
    kill -0 "$2" 2> /dev/null || break
    sleep 1
  done
  kill "$2" 2> /dev/null || true # srun then kills its tasks
  wait "$2" || true
}

# cause LOG NODE...: print the first failure, as srun or torchrun reports it. A process ended by a signal comes first,
# because others fail as a consequence.
cause() {
  local log=$1 line
  shift
  local nodes=("$@")
  line=$(grep -m1 'srun: error: Node failure' "$log" \
    || grep -m1 -E 'failed \(exitcode: -([1-9]|1[0-46-9])\)' "$log" \
    || grep -m1 'srun: error: .*: task' "$log" | grep -v 'Exited with exit code' \
    || grep -m1 -E '[A-Za-z]+Error: ' "$log" \
    || grep -m1 'srun: error: ' "$log" \
    || echo "no message")
  if [[ $line =~ ^\ *([0-9]+):\ (.*)$ ]]; then line="node ${nodes[BASH_REMATCH[1]]}: ${BASH_REMATCH[2]}"; fi
  echo "$line"
}

# shellcheck disable=SC2317,SC2329  # called by trap, as the next two
on_usr1() {
  is_requested=yes
  echo "train.sh: SIGUSR1: the ranks save, then the job is requeued"
  if [ -n "$train_pid" ]; then kill -USR1 "$train_pid" 2> /dev/null || true; fi
}
# shellcheck disable=SC2317,SC2329
on_term() {
  echo "train.sh: SIGTERM: the ranks save if Slurm's KillWait is long enough; train.sh does not requeue the job"
  if [ -n "$train_pid" ]; then kill -0 "$train_pid" 2> /dev/null || exit 143; else exit 143; fi
}
# shellcheck disable=SC2317,SC2329
on_exit() {
  if [ -n "$serve_pid" ]; then end_step sglang "$serve_pid" 60; fi
}
trap on_usr1 USR1
trap on_term TERM
trap on_exit EXIT

requeue() {
  [ -z "$serve_pid" ] || end_step sglang "$serve_pid" 60
  [ "$SDSEARCH_REQUEUE" != never ] || die 1 "$1; not requeued (SDSEARCH_REQUEUE=never): submit the same command again"
  echo "train.sh: $1; requeueing"
  trap 'exit 0' TERM # Slurm ends this script with it
  scontrol requeue "$SLURM_JOB_ID" || die 1 "$1, and Slurm refuses to requeue: submit the same command again"
  sleep 300
  die 1 "requeued, but still running after 300 s"
}

fail() {
  [ "$SDSEARCH_REQUEUE" != failure ] || requeue "$1"
  die 1 "$1"
}

echo "train.sh: job $SLURM_JOB_ID, start $((restart + 1)), on ${nodes[*]}"

# 1. Before GPUs are used: check settings, roles, search engine, and progress since the last start.
code=0
# shellcheck disable=SC2086
settings=$(on_nodes prepare "${nodes[0]}" -- prepare --job "$SLURM_JOB_ID" --restart "$restart" \
  --nodes "${#nodes[@]}" --gpus "${SLURM_GPUS_ON_NODE:-0}" --sglang-nodes "$SDSEARCH_SGLANG_NODES" \
  --max-stalled-starts "$SDSEARCH_MAX_STALLED_STARTS" ${SDSEARCH_RANKS_PER_NODE:+--ranks "$SDSEARCH_RANKS_PER_NODE"} \
  "$@") || code=$?
[ "$code" = 0 ] || die "$code" "not started: see the message above"
setting() { sed -n "s/^$1=//p" <<< "$settings"; }
run_dir=$(setting run_dir)
train_nodes=("${nodes[@]:0:$(setting train_nodes)}")
num_serve=$(setting serve_nodes)
logs=$run_dir/logs/job_$SLURM_JOB_ID.$restart
mkdir -p "$logs"
echo "train.sh: from step $(setting step); logs of ranks and servers: $logs"

# 2. SGLang servers on nodes of their own, or on all.
urls=()
if [ "$num_serve" -gt 0 ]; then
  serve_nodes=("${nodes[@]: -$num_serve}")
  addresses=()
  for node in "${serve_nodes[@]}"; do addresses+=("$(address_of "$node")"); done
  SLURM_LABELIO=1 on_nodes sglang "${serve_nodes[@]}" -- serve "$logs" "${addresses[@]}" -- "$@" \
    > "$logs/sglang.log" 2>&1 &
  serve_pid=$!
  echo "train.sh: waiting for SGLang on ${serve_nodes[*]}"
  until [ "$(find "$logs" -maxdepth 1 -name 'urls.*' | wc -l)" = "$num_serve" ]; do
    if ! kill -0 "$serve_pid" 2> /dev/null; then
      cat "$logs/sglang.log" >&2
      fail "SGLang did not start: $(cause "$logs/sglang.log" "${serve_nodes[@]}")"
    fi
    [ -z "$is_requested" ] || requeue "stop requested before training began"
    sleep 1
  done
  mapfile -t urls < <(cat "$logs"/urls.*)
  set -- "$@" "rollout.sglang.urls=[$(IFS=,; echo "${urls[*]}")]"
fi

# 3. Training.
[ -z "$is_requested" ] || requeue "stop requested before training began"
master=$(address_of "${nodes[0]}")
[ -n "$master" ] || fail "scontrol does not report the address of ${nodes[0]}"
exec 3> >(tee "$logs/train.log") # and the job's own log
tee_pid=$!
SLURM_LABELIO=1 on_nodes train "${train_nodes[@]}" -- train "$logs" \
  "$master" "$(setting port)" "$(setting ranks)" "$@" >&3 2>&3 &
train_pid=$!
exec 3>&-
if [ -n "$is_requested" ]; then kill -USR1 "$train_pid" 2> /dev/null || true; fi # arrived before training started
while kill -0 "$train_pid" 2> /dev/null; do
  wait -n "$train_pid" ${serve_pid:+"$serve_pid"} || true # also returns after a signal
  if [ -n "$serve_pid" ] && ! kill -0 "$serve_pid" 2> /dev/null; then
    echo "train.sh: SGLang has ended; the ranks save and stop" >&2
    end_step train "$train_pid" "$SDSEARCH_STOP_TIMEOUT_S"
    fail "SGLang failed: $(cause "$logs/sglang.log" "${serve_nodes[@]}"); logs: $logs"
  fi
done
wait "$train_pid" || code=$?
wait "$tee_pid" || true

# 4. The outcome, from the files that the trainer has written.
latest=$run_dir/checkpoints/latest
saved="newest checkpoint: $([ -f "$latest" ] && cat "$latest" || echo none)"
if [ "$code" = 0 ] && [ -f "$run_dir/summary.json" ]; then
  echo "train.sh: trained; $saved; $run_dir/summary.json"
  exit 0
fi
stopped_by=$(sed -n 's/.*"signal": "\([^"]*\)".*/\1/p' "$run_dir/stopped.json" 2> /dev/null || true)
if [ "$stopped_by" = SIGUSR1 ]; then
  requeue "stopped on SIGUSR1; $saved"
elif [ -n "$is_requested" ] || grep -qE 'Received 10 death signal|User defined signal 1' "$logs/train.log"; then
  # Usually a rank or torchrun was not able to save yet when the signal arrived.
  requeue "stopped on SIGUSR1 without saving: $(cause "$logs/train.log" "${train_nodes[@]}"); $saved"
elif [ "$stopped_by" = SIGTERM ] || [ "$stopped_by" = SIGINT ]; then
  die 143 "stopped by $stopped_by; $saved; the same command continues from there"
fi
fail "failed: $(cause "$logs/train.log" "${train_nodes[@]}"); $saved; logs: $logs"
