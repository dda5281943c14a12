#!/usr/bin/env bash
# Tests Python 3.13, 3.12 and 3.11, if they are on PATH or installed with pyenv. 3.13 and 3.12 have the newest JAX: 3.13
# runs those quick tests that depend on the versions. All three install the wheel and run tests of the source
# distribution, 3.12 the pinned tokens among them. Creates or updates .venv, .venv-3.13 and .venv-3.12 if needed.
# Arguments are passed to pytest on 3.13.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Builds a source distribution, which must hold all files that git tracks, and a wheel from it.
build_distributions() {
  environment .venv dev
  if ! .venv/bin/python -m build --outdir "$work/dist" . >"$work/build.log" 2>&1; then
    tail -n 20 "$work/build.log" >&2
    return 1
  fi
  mkdir "$work/sdist"
  tar -xzf "$work"/dist/*.tar.gz -C "$work/sdist" --strip-components 1
  if [[ -e .git ]]; then
    (cd "$work/sdist" && find . -type f | cut -c 3- | grep -vE '^(PKG-INFO$|setup.cfg$|hipgpt_jax.egg-info/)' |
      LC_ALL=C sort) >"$work/packed"
    git ls-files | LC_ALL=C sort | diff - "$work/packed"
  fi
}

# check_distributions VENV TESTS...
# Installs the wheel in an environment of its own with the Python of VENV, generates there, and runs tests of the
# unpacked source distribution. The dependencies are those of VENV: to download them again would take minutes.
check_distributions() {
  local venv=$1 clean=$work/$1
  shift
  "$venv/bin/python" -m venv --without-pip "$clean"
  "$venv/bin/python" -m pip --python "$clean/bin/python" install --quiet --no-index --no-deps "$work"/dist/*.whl
  "$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' |
    "$clean/bin/python" -c 'import pathlib, sysconfig
pathlib.Path(sysconfig.get_path("purelib"), "dependencies.pth").write_text(input())'
  "$venv/bin/python" -m pip --python "$clean/bin/python" check
  (cd "$work" && "$clean/bin/hipgpt-generate" --run-name shakespeare --prompt "To be, or not to be:" --num_tokens 8)
  (cd "$work/sdist" && "$clean/bin/python" -m pytest -q -n 2 -m "not slow and not peers" "$@")
}

# What depends on the versions of Python and JAX: the promise, the draw, the model, training and resuming, records, and
# the programs. Compiling takes most of the time, so all other tests are left to run_tests.sh.
pinned=(tests/test_{promise,promise_shipped,promise_page}.py
  tests/test_docs.py::test_the_readmes_sample_is_what_its_command_prints)
others=(tests/test_{sampling,decoding,transformer,training,loop,record,files,generate_cli,replay_cli,train_start}.py
  tests/test_{streams,numerics,export_cache}.py)
tried=()
build_distributions
for version in 3.13 3.12 3.11; do
  for candidate in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/"python$version"; do
    "$candidate" -c "$ENVIRONMENT_PROBE" >/dev/null 2>&1 || continue
    venv=.venv-$version
    if [[ $(.venv/bin/python -V) == "Python $version."* ]]; then venv=.venv; fi
    PYTHON=$candidate environment "$venv" dev
    echo "== Python $version with $("$venv/bin/python" -m pip freeze | grep -E '^(jax|flax)==' | paste -sd' ')"
    tests=(tests/test_packaging.py tests/test_scripts.py::test_is_bash)
    case $version in
    3.13) "$venv/bin/python" -m pytest -q -n 2 --dist worksteal -m "not slow and not peers" "${pinned[@]}" \
      "${others[@]}" "$@" ;;
    3.12) tests+=("${pinned[@]}") ;;
    esac
    check_distributions "$venv" "${tests[@]}"
    tried+=("$version")
    break
  done
done
echo "check_versions.sh: ${tried[*]:-no Python 3.11 to 3.13 is installed}"
