#!/usr/bin/env bash
# From nothing to a pretrained small VLMo with its retrieval scores: installs into .venv, makes data, pretrains in stages.
# Further arguments go to train_ds.py, such as stages.joint.steps=1000.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh
export PATH="$PWD/.venv/bin:$PATH"
exec python -m vlmo_ds quickstart "$@"
