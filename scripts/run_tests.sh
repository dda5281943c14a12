#!/usr/bin/env bash
# Runs the quick tests that do not need torch. Creates or updates .venv if needed. Arguments are passed to pytest:
# -m slow runs the slow tests, --hypothesis-profile=thorough tries four times as many examples.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
environment .venv dev
exec .venv/bin/python -m pytest -n 2 --dist worksteal -m "not slow and not peers" "$@"
