#!/usr/bin/env bash
# Runs the tests that need neither torch nor a GPU; makes .venv when it is missing or stale. Arguments go to pytest.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
environment .venv dev
exec .venv/bin/python -m pytest -n 2 -m "not peers and not gpu" "$@"
