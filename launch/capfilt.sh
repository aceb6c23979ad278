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
capfilt() { # command, run, set, new set, options
    [ -e "$web/$4/capfilt.json" ] || python -m vlmo_ds.evaluation.capfilt "$1" "runs/$2" --shards "$web/$3" --output "$web/$4" "${@:5}"
}

[ -e $web/test/index.json ] || python -m vlmo_ds.data.prepare synthetic_web --output $web --test 1000
train capfilt_noisy
train capfilt_captioner
train capfilt_filter
for set in one web; do
    # A small captioner is right more often where it writes what is likeliest.
    capfilt caption capfilt_captioner $set ${set}_captioned --top_p 0.2
    # Matching was learnt against hard wrong pairs, two for each right one; this web's wrong captions are any other image's, so that a
    # right one that the filter doubts is told from them by far less than one half. A third of what this captioner writes is wholly right,
    # and a filter that learnt to tell scenes apart does not see a thing in the wrong place: the web's own captions, where they fit, are better.
    capfilt filter capfilt_filter ${set}_captioned ${set}_clean --threshold 0.04 --synthetic instead
done
train capfilt_clean
