#!/usr/bin/env bash
# One training on one or several machines. Start it on each of them with the same words:
#   NODES=2 GPUS=8 HEAD=host0:29500 examples/torchrun.sh recipe=quickstart output_dir=/shared/runs
# HEAD is any one of the machines. When a process dies, all are started again (RESTARTS times at most) and go on from
# the last checkpoint; so leave --fresh out.
set -euo pipefail
# torchrun would keep its store of addresses over a restart, and a process could read those of the ones that are gone:
# https://github.com/pytorch/pytorch/issues/135712
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
NODES="${NODES:-1}" GPUS="${GPUS:-1}"
exec python -m torch.distributed.run \
  --nnodes="$NODES" --nproc-per-node="$GPUS" --max-restarts="${RESTARTS:-3}" \
  --rdzv-backend=c10d --rdzv-id=eyespot --rdzv-endpoint="${HEAD:-localhost:29500}" \
  -m eyespot train "$@" trainer.num_nodes="$NODES" trainer.devices="$GPUS"
