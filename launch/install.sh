#!/usr/bin/env bash
# Installs what is needed into .venv, once. VLMO_TORCH names another PyTorch to install, such as "torch==2.11.0".
set -euo pipefail
cd "$(dirname "$0")/.."
stamp=.venv/.installed-$(cat setup.py "$0" | cksum | cut -d' ' -f1)
[ -f "$stamp" ] && exit 0
echo "installing into $PWD/.venv: PyTorch, DeepSpeed and what else vlmo_ds needs (once, some minutes)"
[ -x .venv/bin/python ] || python3 -m venv .venv
pip() { .venv/bin/python -m pip --quiet --disable-pip-version-check "$@"; }
pip install --upgrade pip setuptools wheel
.venv/bin/python -c 'import torch' 2>/dev/null || pip install "${VLMO_TORCH:-torch==2.13.0}"
DS_BUILD_OPS=0 pip install --no-build-isolation -e '.[test]'
# its package asks for torchvision, which tests of ours do without
pip install --no-deps open_clip_torch==3.3.0
touch "$stamp"
