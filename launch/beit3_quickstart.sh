#!/usr/bin/env bash
# From nothing to a small BEiT-3: a teacher, a visual tokenizer of its features, masked data modelling on images, texts and pairs, then
# retrieval and captions from the pretrained weights. Each is a run of its own below runs/, and goes on where it was when this is started again.
# --fresh trains retrieval and captions from random weights as well, to see what the pretraining is worth.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh
export PATH="$PWD/.venv/bin:$PATH"
recipes=launch/recipes/beit3_quickstart
train() { python train_ds.py --deepspeed_config ds_configs/zero2.json --recipe "$recipes/beit3_quickstart$1.yaml" "${@:2}"; }
[ -d data/synthetic ] || python -m vlmo_ds.data.prepare synthetic --output data/synthetic
for name in _teacher _tokenizer "" _retrieval _captions; do train "$name"; done
if [ "${1:-}" = --fresh ]; then
    for name in retrieval captions; do
        train "_$name" "name=beit3_quickstart_${name}_fresh" "stages.$name.init={weights: fresh}"
    done
fi
