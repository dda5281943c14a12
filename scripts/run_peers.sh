#!/usr/bin/env bash
# Runs the comparison tests with torch and transformers in .venv-peers, which it creates or updates if needed.
# The pinned version selects the CPU build of torch if the package index has one, which saves several GB of CUDA
# libraries. PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu adds such an index.
# Arguments are passed to pytest.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
environment .venv-peers dev,peers torch==2.13.0
exec .venv-peers/bin/python -m pytest -n 2 --dist worksteal -m peers "$@"
