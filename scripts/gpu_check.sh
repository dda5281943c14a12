#!/usr/bin/env bash
# Runs scripts/gpu_check.py on this machine's GPU, in .venv-gpu, which it creates or updates if needed. Stdout is one
# JSON object, all other output goes to stderr. Arguments are passed on. Without a network, run
# `python scripts/gpu_check.py` in an environment with this package, pytest, hypothesis and JAX's GPU plugin.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
if nvidia-smi -L 2>/dev/null | grep -q GPU; then
  extra=cuda
elif [[ -e /dev/kfd ]]; then
  extra=rocm
else
  echo "gpu_check: error: no GPU here: nvidia-smi lists none, and there is no /dev/kfd of AMD's driver. Install the" \
    "driver, or run this on a machine that has one" >&2
  exit 1
fi
environment .venv-gpu "dev,$extra"
exec .venv-gpu/bin/python scripts/gpu_check.py "$@"
