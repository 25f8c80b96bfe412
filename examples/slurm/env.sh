# The only file here that differs from site to site. Every job script reads it, on the batch host, from the repository's root.

# --- what sbatch needs to know, so that the scripts stay the same (https://slurm.schedmd.com/sbatch.html, "input environment
#     variables"); they work when this file is sourced before sbatch is called
# export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=me

# --- how ranks are started: "torchrun" (SLURM starts one torchrun per node) or "srun" (SLURM starts every rank)
LAUNCH=${LAUNCH:-torchrun}

# --- Python with megatron_omni installed, as seen inside the container if there is one
OMNI_PYTHON=${OMNI_PYTHON:-.venv/bin/python}

# --- container, optional. With pyxis: options of srun. With apptainer: a command in front of Python.
SRUN_OPTIONS=() # (--container-image=/images/omni.sqsh --container-mounts="$PWD:$PWD" --container-workdir="$PWD")
CONTAINER=()    # (apptainer exec --nv --bind "$PWD" /images/omni.sif)

# --- network. The address of the first node, if its host name is not the one that the nodes should talk to:
# MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)-ib
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# export NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5
# For hundreds of ranks NCCL's own settings of all communicators: how many multiprocessors messages take, and in what groups.
# export NCCL_MIN_CTAS=8 NCCL_MAX_CTAS=16 NCCL_CGA_CLUSTER_SIZE=2
# CUDA_DEVICE_MAX_CONNECTIONS=1 and PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True are set by every rank itself, unless
# set here.

# --- seconds that a checkpoint may take after a stop signal; less than the jobs' --signal=USR1@600
SAVE_SECONDS=${SAVE_SECONDS:-540}
