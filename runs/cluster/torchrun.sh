#!/usr/bin/env bash
# One training stage over all GPUs of a machine, or of several machines when it is started on each of them.
#
#   runs/cluster/torchrun.sh sft --model models/base --data dialogs.jsonl --out runs/sft --resume
#
# After the stage come the flags of `moss train STAGE`. Started again with --resume it goes on, over any number of GPUs.
set -euo pipefail

# ---- the lines to change; each may also be given before the command: NODES=2 runs/cluster/torchrun.sh … ----
NODES=${NODES:-1}               # machines
FIRST=${FIRST:-localhost:29500} # name and free port of the first machine, as the others see it
RUN=${RUN:-moss}                # a name of this run: the same on all its machines, another than those of other runs
PROCESSES=${PROCESSES:-$({ nvidia-smi -L 2> /dev/null || true; } | wc -l)} # on this machine, one for each GPU
PYTHON=${PYTHON:-.venv/bin/python} # seen from the project's root; torch and moss are installed there
# export NCCL_SOCKET_IFNAME=eth0  # the network card, where NCCL picks the wrong one
# ------------------------------------------------------------------------------------------------------------

case ${1:---help} in
  -h | --help)
    sed -n '2,6s/^# \{0,1\}//p' "$0"
    echo "now: NODES=$NODES FIRST=$FIRST RUN=$RUN PROCESSES=$PROCESSES PYTHON=$PYTHON"
    exit 0
    ;;
  -*)
    echo "torchrun.sh: the stage comes first, then its flags; see runs/cluster/torchrun.sh --help" >&2
    exit 2
    ;;
esac
if ! [ "$PROCESSES" -gt 0 ]; then
  echo "torchrun.sh: nvidia-smi shows no GPU here; with CPUs alone: PROCESSES=2 runs/cluster/torchrun.sh $1 --device cpu …" >&2
  exit 1
fi

cd "$(dirname "$0")/../.."
CORES=$(($(nproc) / PROCESSES))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((CORES > 0 ? CORES : 1))}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-540} # seconds to finish a step and save in
if [ "$NODES" -gt 1 ]; then
  MEET=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "$FIRST" --rdzv-id "$RUN")
else
  MEET=(--standalone)
fi
exec "$PYTHON" -m torch.distributed.run "${MEET[@]}" --nproc-per-node "$PROCESSES" -m moss train "$@"
