#!/usr/bin/env bash
# From nothing to a pretrained small VLMo with its retrieval scores: installs into .venv, makes data, trains three stages.
# Further arguments go to train_ds.py, such as stages.joint.steps=1000.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh
export PATH="$PWD/.venv/bin:$PATH"
[ -f data/synthetic/text/index.json ] || python -m vlmo_ds.data.prepare synthetic --output data/synthetic --overwrite
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)))')
if [ "$gpus" -gt 0 ]; then ranks=$gpus; elif [ "$cores" -ge 2 ]; then ranks=2; else ranks=1; fi
deepspeed --num_gpus "$ranks" train_ds.py --deepspeed_config ds_configs/zero2.json "$@"
