#!/usr/bin/env bash
# Make .venv-quantise, the environment of NVIDIA's Model Optimizer, with everything pinned. Safe to run again.
#   scripts/setup_quantise.sh [python]      python: the interpreter to build on, default python3.11
set -euo pipefail
cd "$(dirname "$0")/.."

readonly PYTHON="${1:-python3.11}"
readonly VENV=".venv-quantise"
readonly STAMP="$VENV/.setup-stamp"

wanted="$({ cat requirements/quantise.txt scripts/setup_quantise.sh && pwd -P; } | sha256sum | cut -d' ' -f1)"
if [[ -f "$STAMP" && "$(<"$STAMP")" == "$wanted" ]]; then
    echo "setup: $VENV is fresh"
    exit
fi
echo "setup: $VENV: the Model Optimizer (1.4 GB, some minutes; a CPU build of torch where your index gives one)"
rm -rf "$VENV"
"$PYTHON" -m venv "$VENV"
"$VENV/bin/python" -m pip --disable-pip-version-check --no-input install --quiet -r requirements/quantise.txt
"$VENV/bin/python" -c 'import modelopt.onnx.quantization; print(f"setup: Model Optimizer {modelopt.__version__}")'
echo "$wanted" >"$STAMP"
