#!/usr/bin/env bash
# All benchmarks of speed and memory that this machine allows, one after the other, and the tables of docs/performance.md.
#     bash benchmarks/all.sh NAME
# Results go to benchmarks/results/*_NAME.json, such as NAME=epyc_zen4_2core. Nothing else should run meanwhile: half an hour on two cores.
# On a GPU: benchmarks/gpu.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
name=${1:?a name for this machine, such as epyc_zen4_2core}
bash launch/install.sh
export PATH="$PWD/.venv/bin:$PATH"
result() { echo "benchmarks/results/$1_$name.json"; }

# bf16 only where this machine computes in it: elsewhere each step takes minutes.
precisions=(float32)
native=$(python -c "from vlmo_ds.training.precision import native; print(native().precision)" | tail -n 1)
[ "$native" = bf16 ] && precisions+=(bfloat16)
golden() { if [ -f "../shared/golden/$1.pt" ]; then echo --golden "../shared/golden/$1.pt"; fi; }

python benchmarks/startup.py --output "$(result startup)"
python benchmarks/step.py --arch vlmo_base_patch16 coca_ViT-B-32 blip_ViT-B-16 --batch 4 8 --dtype "${precisions[@]}" --output "$(result step)"
python benchmarks/step.py --recompute none cheap blocks --batch 8 --dtype "${precisions[@]: -1}" --output "$(result recompute)"
python benchmarks/step.py --compile none blocks --batch 4 --dtype "${precisions[@]}" --output "$(result compile)"
python benchmarks/baseline.py $(golden vlmo_A) --dtype "${precisions[@]}" --output "$(result baseline)"
python benchmarks/coca_step.py $(golden coca_A) --dtype "${precisions[@]}" --output "$(result coca_step)"
python benchmarks/blip_step.py $(golden blip_A) --dtype "${precisions[@]}" --output "$(result blip_step)"
python benchmarks/beit3_step.py $(golden beit3_A) --dtype "${precisions[@]}" --output "$(result beit3_step)"
python benchmarks/attention.py --output "$(result attention)"
python benchmarks/collector.py --output "$(result collector)"
python benchmarks/scaling.py --output "$(result scaling)"
python benchmarks/generation.py --output "$(result generation)"
python benchmarks/gradient_cache.py --output "$(result gradient_cache)"
python benchmarks/precision.py --output "$(result precision)"
python benchmarks/tables.py
