#!/usr/bin/env bash
# Runs the tests that the promise rests on with the newest JAX, on each newer Python that is installed: on PATH, or
# with pyenv. Makes .venv-3.12 and .venv-3.13 where they are missing or stale. Arguments go to pytest.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
tests=(tests/test_{promise,sampling,facts,shipped,api,exported,batch}.py)
tried=()
for version in 3.12 3.13; do
  for candidate in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/"python$version"; do
    "$candidate" -c "$ENVIRONMENT_PROBE" >/dev/null 2>&1 || continue
    PYTHON=$candidate environment ".venv-$version" dev
    echo "== Python $version with $(".venv-$version/bin/python" -m pip freeze | grep -E '^(jax|flax)==' | paste -sd' ')"
    ".venv-$version/bin/python" -m pytest -q -n 2 "${tests[@]}" "$@"
    tried+=("$version")
    break
  done
done
echo "check_versions.sh: ${tried[*]:-no Python 3.12 or 3.13 is installed}"
