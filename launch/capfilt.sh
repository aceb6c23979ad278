#!/usr/bin/env bash
# The whole of CapFilt (arXiv:2201.12086, section 3.3) on the synthetic world, in the current folder: pretrain on noisy captions, fine-tune a
# captioner and a filter on captions of people, caption and filter, pretrain again from scratch. About 35 minutes on two cores; given
# again after a break it goes on where it was.
set -euo pipefail
export PATH="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin:$PATH"
recipes="$(cd "$(dirname "$0")" && pwd)/recipes/capfilt"
web=data/synthetic_web
ranks=$(python -c 'from vlmo_ds.quickstart import ranks; print(ranks())')

train() { deepspeed --num_gpus "$ranks" "$(dirname "$0")/../train_ds.py" --recipe "$recipes/$1.yaml"; }
capfilt() { # command, run, set, new set
    [ -e "$web/$4/capfilt.json" ] || python -m vlmo_ds.evaluation.capfilt "$1" "runs/$2" --shards "$web/$3" --output "$web/$4"
}

[ -e $web/test/index.json ] || python -m vlmo_ds.data.prepare synthetic_web --output $web --test 1000
train capfilt_noisy
train capfilt_captioner
train capfilt_filter
for set in one web; do
    capfilt caption capfilt_captioner $set ${set}_captioned
    capfilt filter capfilt_filter ${set}_captioned ${set}_clean
done
train capfilt_clean
