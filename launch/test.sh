#!/usr/bin/env bash
# Installs into .venv what is needed and runs the tests. --all adds the long sweeps; further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh
export PATH="$PWD/.venv/bin:$PATH"
marks='not long'
if [ "${1:-}" = --all ]; then marks=''; shift; fi
python -m pytest -m "$marks" -rs "$@"
