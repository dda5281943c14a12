#!/usr/bin/env bash
# Tests Python 3.13 and 3.12 with the newest JAX, if they are on PATH or installed with pyenv: those quick tests
# that depend on the versions on the first one found, the pinned tokens on the other. Creates or updates .venv-3.13 and
# .venv-3.12 if needed. Arguments are passed to pytest.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
# What depends on the versions of Python and JAX: the promise, the draw, the model, training and resuming, records, and
# the programs. Compiling takes most of the time, so all other tests are left to run_tests.sh.
tests=(tests/test_{promise,promise_shipped,promise_page,sampling,decoding,transformer,training,loop,record,files}.py
  tests/test_{generate_cli,replay_cli,train_start,streams,numerics,export_cache}.py
  tests/test_docs.py::test_the_readmes_sample_is_what_its_command_prints)
tried=()
for version in 3.13 3.12; do
  for candidate in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/"python$version"; do
    "$candidate" -c "$ENVIRONMENT_PROBE" >/dev/null 2>&1 || continue
    PYTHON=$candidate environment ".venv-$version" dev
    echo "== Python $version with $(".venv-$version/bin/python" -m pip freeze | grep -E '^(jax|flax)==' | paste -sd' ')"
    ".venv-$version/bin/python" -m pytest -q -n 2 --dist worksteal -m "not slow and not peers" \
      "${tests[@]}" "$@"
    tests=(tests/test_promise.py tests/test_promise_shipped.py tests/test_promise_page.py
      tests/test_docs.py::test_the_readmes_sample_is_what_its_command_prints)
    tried+=("$version")
    break
  done
done
echo "check_versions.sh: ${tried[*]:-no Python 3.12 or 3.13 is installed}"
