#!/usr/bin/env bash
# Runs the comparison tests with torch and transformers in .venv-peers, which it creates or updates if needed.
# The CPU build of torch saves several GB of CUDA libraries: uv finds it by UV_TORCH_BACKEND, and pip if its index has
# one, as with PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu. Arguments are passed to pytest.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
UV_TORCH_BACKEND=cpu environment .venv-peers dev,peers
exec .venv-peers/bin/python -m pytest -n 2 --dist worksteal -m peers "$@"
