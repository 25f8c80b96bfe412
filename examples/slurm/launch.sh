# Read by every job script after env.sh: starts the ranks of a job, and requeues it when training stopped on a signal.
#
#   train RECIPE [key=value ...]    train, continuing from the run's newest checkpoint if there is one (load=auto)
#   train RECIPE ... --dry-run      say what that would be on the ranks of this job, and whether its files would do
#   launch FILE|-m MODULE ARGS      run Python on every rank, by $LAUNCH
#   each_node FILE|-m MODULE ARGS   run Python once on every node

set -uo pipefail
trap : USR1 TERM # stop signals are for the ranks; this shell waits for them and then decides

NODES=$SLURM_JOB_NUM_NODES
RANKS_PER_NODE=$SLURM_NTASKS_PER_NODE
export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
export WORLD_SIZE=$((NODES * RANKS_PER_NODE))
CPUS_PER_RANK=$((SLURM_CPUS_ON_NODE / RANKS_PER_NODE > 0 ? SLURM_CPUS_ON_NODE / RANKS_PER_NODE : 1))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$CPUS_PER_RANK}
# A failed collective must end its rank, not leave it waiting; what every rank exchanged last is kept, and written when a
# collective has timed out (`torchfrtrace RUN_DIR -p nccl_trace_rank_` compares the ranks).
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
export TORCH_NCCL_TRACE_BUFFER_SIZE=${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}

# One task a node, with all its CPUs. One task that fails ends the others: the run can only go on as a whole.
on_nodes() { srun --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" \
  --kill-on-bad-exit=1 ${SRUN_OPTIONS[@]+"${SRUN_OPTIONS[@]}"} "$@"; }
python=(${CONTAINER[@]+"${CONTAINER[@]}"} "$OMNI_PYTHON")

one_rank() { srun --nodes=1 --ntasks=1 ${SRUN_OPTIONS[@]+"${SRUN_OPTIONS[@]}"} "${python[@]}" "$@"; }

each_node() { on_nodes "${python[@]}" "$@"; }

launch() {
  if [ "$LAUNCH" = torchrun ]; then
    # Our torchrun passes USR1 on and ends without a traceback; it must be told how long the checkpoint may take.
    on_nodes bash -c 'export PET_NODE_RANK=$SLURM_NODEID; exec "$@"' _ "${python[@]}" -m megatron_omni.platform.torchrun \
      --nnodes "$NODES" --nproc-per-node "$RANKS_PER_NODE" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
      --max-restarts 0 --shutdown-timeout "$SAVE_SECONDS" "$@"
  else
    # srun gives a task one CPU unless told otherwise, whatever the job has.
    srun --ntasks="$WORLD_SIZE" --ntasks-per-node="$RANKS_PER_NODE" --cpus-per-task="$CPUS_PER_RANK" --kill-on-bad-exit=1 \
      ${SRUN_OPTIONS[@]+"${SRUN_OPTIONS[@]}"} bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; exec "$@"' _ \
      "${python[@]}" "$@"
  fi
}

train() {
  local run_dir status stopped word
  for word in "$@"; do
    if [ "$word" = --dry-run ]; then
      one_rank -m megatron_omni.cli.train "$@" load=auto # WORLD_SIZE tells it of the others
      return
    fi
  done
  run_dir=$(one_rank -c \
    'import sys; from megatron_omni.config.load import load_recipe; print(load_recipe(sys.argv[1], sys.argv[2:]).run_dir)' \
    "$@")
  status=$?
  if [ "$status" = 0 ]; then
    echo "== job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $1 in $run_dir, $NODES x $RANKS_PER_NODE ranks by $LAUNCH"
    rm -f "$run_dir/requeue"
    export TORCH_NCCL_DEBUG_INFO_TEMP_FILE=${TORCH_NCCL_DEBUG_INFO_TEMP_FILE:-$run_dir/nccl_trace_rank_}
    launch -m megatron_omni.cli.train "$@" load=auto
    status=$?
  fi
  # torchrun's status says nothing about its workers'. The run leaves this file when it stopped with a whole checkpoint;
  # ranks that were still starting up die of the signal (128 + USR1 or TERM), and there is nothing new to save.
  if [ -n "$run_dir" ] && [ -e "$run_dir/requeue" ]; then
    stopped="after step $(cat "$run_dir/requeue")"
  elif [ "$status" = 138 ] || [ "$status" = 143 ]; then
    stopped="by a signal, nothing saved since the last checkpoint"
  else
    echo "== ended with status $status"
    return "$status"
  fi
  if scontrol show job "$SLURM_JOB_ID" | grep -q JobState=CANCELLED; then
    echo "== cancelled; stopped $stopped; submit it again to continue"
  else
    echo "== stopped $stopped; requeued"
    scontrol requeue "$SLURM_JOB_ID" || true # preempted jobs are in the queue already
  fi
}
