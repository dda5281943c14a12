#!/usr/bin/env bash
# Runs the tests that compare with torch and transformers, in .venv-peers, made when it is missing or stale.
# The fixed version picks the CPU build of torch where an index offers one, which spares several GB of CUDA libraries;
# elsewhere PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu offers it. Arguments go to pytest.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
environment .venv-peers dev,peers torch==2.13.0
exec .venv-peers/bin/python -m pytest -n 2 --dist worksteal -m peers "$@"
