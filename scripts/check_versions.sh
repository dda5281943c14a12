#!/usr/bin/env bash
# Runs the tests that the promise rests on with the newest JAX, on the newest Python from 3.12 on that is installed: on
# PATH, or with pyenv. On the other one, which has the same JAX, it runs those of whole runs and commands. Makes
# .venv-3.13 and .venv-3.12 where they are missing or stale. Arguments go to pytest.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
tests=(tests/test_{promise,sampling,facts,shipped,api,exported,batch}.py)
tried=()
for version in 3.13 3.12; do
  for candidate in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/"python$version"; do
    "$candidate" -c "$ENVIRONMENT_PROBE" >/dev/null 2>&1 || continue
    PYTHON=$candidate environment ".venv-$version" dev
    echo "== Python $version with $(".venv-$version/bin/python" -m pip freeze | grep -E '^(jax|flax)==' | paste -sd' ')"
    ".venv-$version/bin/python" -m pytest -q -n 2 "${tests[@]}" "$@"
    tried+=("$version")
    tests=(tests/test_{promise_shipped,shipped,exported,generate_cli}.py)
    break
  done
done
echo "check_versions.sh: ${tried[*]:-no Python 3.12 or 3.13 is installed}"
