#!/usr/bin/env bash
# One training stage over the machines of a Slurm job; `sbatch --help` has what the lines with #SBATCH may say.
#
#   sbatch runs/cluster/slurm.sh sft --model models/base --data dialogs.jsonl --out /shared/runs/sft
#
# The job goes on where it was when it is started again: after its time is up it saves and puts itself into the queue.
#
# ---- the lines to change; --out and --data must be on a disk that all machines see ----
#SBATCH --job-name=moss
#SBATCH --nodes=16
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@600
# #SBATCH --partition=gpu --account=lab
PORT=29500  # free on the first machine
# ---------------------------------------------------------------------------------------
set -euo pipefail

case ${1:---help} in
  -h | --help)
    sed -n '2,6s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
esac
if [ -z "${SLURM_JOB_ID:-}" ]; then
  echo "slurm.sh: this is no Slurm job; sbatch runs/cluster/slurm.sh $1 … makes one, runs/cluster/torchrun.sh needs none" >&2
  exit 2
fi

cd "$SLURM_SUBMIT_DIR" # the project's root: Slurm runs a copy of this file that stands elsewhere
[ -x runs/cluster/torchrun.sh ] || { echo "slurm.sh: start sbatch in the project's root, not in $PWD" >&2 && exit 2; }
export NODES=$SLURM_NNODES RUN=$SLURM_JOB_ID PROCESSES=$SLURM_GPUS_ON_NODE
FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p):$PORT
export FIRST

# Ten minutes before the end Slurm sends SIGTERM to this shell: the ranks hear of it, finish their step and save.
ENDING=""
trap 'ENDING=yes; scancel --signal=TERM "$SLURM_JOB_ID.0"' TERM
srun --kill-on-bad-exit=1 runs/cluster/torchrun.sh "$@" --resume &
CODE=0
wait $! || CODE=$?
if [ -n "$ENDING" ]; then # `wait` came back for the signal: wait for the ranks themselves, then queue again
  wait $! || true
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit $CODE
