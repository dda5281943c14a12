#!/usr/bin/env bash
# Creates or updates .venv if needed, then runs hipgpt-generate in the repository's root.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
environment .venv
exec .venv/bin/hipgpt-generate "$@"
