#!/usr/bin/env bash
# All rows that need a GPU, on one, in under 9 minutes.
#     bash benchmarks/gpu.sh NAME [FOLDER]
# Results go to FOLDER/*_NAME.json (benchmarks/results). The installed Python has PyTorch for the GPU, DeepSpeed and the other requirements of
# setup.py. PAIRS (128) is the number of pairs a step, LARGE_PAIRS (64) that of the large models, WIDE_PAIRS (24) that at 480 pixels; a step
# that does not fit into the GPU's memory is a row that says so.
set -euo pipefail
cd "$(dirname "$0")/.."
name=${1:?a name for this machine, such as h100}
folder=${2:-benchmarks/results}
mkdir -p "$folder"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
failed=0
row() { timeout "$@" || { echo "failed or out of time: ${*:2}"; failed=1; }; }
step() { row "$1" python benchmarks/step.py --dtype bfloat16 --repeats "${REPEATS:-10}" "${@:3}" --output "$folder/$2_$name.json"; }

step 120 step --arch vlmo_base_patch16 coca_ViT-B-32 blip_ViT-B-16 --batch "${PAIRS:-128}"
step 90 step_large --arch vlmo_large_patch16 coca_ViT-L-14 blip_ViT-L-16 --batch "${LARGE_PAIRS:-64}"
step 60 step_480 --arch vlmo_base_patch16 blip_ViT-B-16 --image_size 480 --batch "${WIDE_PAIRS:-24}"
step 60 recompute --recompute none cheap blocks --batch "${LARGE_PAIRS:-64}"
step 60 compile --compile none blocks --batch "${PAIRS:-128}"
row 60 python benchmarks/collector.py --ranks --output "$folder/collector_$name.json"
row 30 python benchmarks/attention.py --output "$folder/attention_$name.json"
row 60 python benchmarks/generation.py --output "$folder/generation_$name.json"
exit "$failed"
