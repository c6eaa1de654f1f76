#!/usr/bin/env bash
# The checks and the table of tests/bench/gpu.py, on a machine with torch (CUDA), transformers, peft, accelerate and
# safetensors and without a registry; what else it needs comes from a folder of wheels (`python -m tests.bench.wheels`).
#
#     bash tests/bench/gpu.sh [WHEELS] [options of tests.bench.gpu]
set -euo pipefail
cd "$(dirname "$0")/../.."
wheels=build/wheels
if [ $# -gt 0 ] && [ -d "$1" ]; then
    wheels=$1
    shift
fi
site=$PWD/build/bench/site
if [ -d "$wheels" ]; then
    for wheel in "$wheels"/*.whl; do
        python3 -m zipfile -e "$wheel" "$site"
    done
fi
export PYTHONPATH="$PWD:$site:${PYTHONPATH:-}"
exec timeout 600 python3 -m tests.bench.gpu "$@"
