#!/usr/bin/env bash
# Checks formatting, lint, types and docstring examples. Creates or updates .venv if needed.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
environment .venv dev
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/pyright --pythonpath .venv/bin/python
# cli/lm_eval.py exits when it is imported without the lm-eval extra.
.venv/bin/python -m pytest -q --doctest-modules hipgpt_jax --ignore=hipgpt_jax/cli/lm_eval.py
echo "check.sh: format, lint, types and docstrings are clean"
