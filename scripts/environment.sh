# Creates or updates a virtual environment in the repository's root; source it there. If the environment is current,
# this takes a few milliseconds and starts no Python. Works with Bash 3.2.

# environment NAME [EXTRAS [REQUIREMENT]]
# Installs this package in ./NAME, editable, with at least EXTRAS ("dev,peers"), resolved together with REQUIREMENT.
# On failure, prints an error on stderr and exits. Writes nothing to stdout.
environment() {
  cd -P . || exit # resolve symbolic links, so that $PWD is unique
  environment_is_current "$@" || environment_install "$@" 9<>scripts/environment.sh || exit
}

# Compares the stamp, which is written last: the extras on its first line, then the key.
environment_is_current() {
  local venv=$PWD/$1 wanted=${2:-} stamp extra
  [[ -x $venv/bin/python && -r $venv/hipgpt-stamp ]] || return
  stamp=$(<"$venv/hipgpt-stamp")
  [[ ${stamp#*$'\n'} == "$(environment_key "$@")" ]] || return
  for extra in ${wanted//,/ }; do
    [[ ,${stamp%%$'\n'*}, == *,$extra,* ]] || return
  done
}

# Prints all that an environment depends on besides its extras: its path, the requirement and pyproject.toml.
environment_key() {
  printf '%s\n%s\n%s' "$PWD/$1" "${3:-}" "$(<pyproject.toml)"
}

# Only one installation runs at a time: file descriptor 9 holds the lock until this subshell ends. A killed installation
# leaves the stamp "unfinished", and the next one starts from scratch. If pip fails, for example without a network, the
# previous stamp is restored.
environment_install() (
  trap 'exit 130' INT # pip turns Ctrl-C into an ordinary failure
  name=$1 venv=$PWD/$1 extras=${2:-} requirement=${3:-} stamp=''
  python=$(environment_python) && "$python" -c "$ENVIRONMENT_LOCK" || exit 1
  if environment_is_current "$@"; then exit; fi # another process has just installed it

  key=$(environment_key "$@")
  if [[ -r $venv/hipgpt-stamp ]]; then stamp=$(<"$venv/hipgpt-stamp"); fi
  if [[ $stamp != unfinished ]] && environment_is_usable "$venv"; then
    installed=${stamp%%$'\n'*}
    for extra in ${installed//,/ }; do
      [[ ,$extras, == *,$extra,* ]] || extras=${extras:+$extras,}$extra
    done
    echo "environment: updating $name from pyproject.toml${extras:+ with extras $extras}" >&2
    echo unfinished >"$venv/hipgpt-stamp"
    : >"$venv/install.log"
  else
    echo "environment: creating $name with $python: downloads JAX and its libraries once (1 GB, some minutes)" >&2
    stamp=unfinished
    mkdir -p "$venv" && echo "$stamp" >"$venv/hipgpt-stamp" || exit 1
    find "$venv/." -mindepth 1 -maxdepth 1 ! -name hipgpt-stamp -exec rm -rf {} +
    "$python" -m venv "$venv" >"$venv/install.log" 2>&1 || environment_fail "$name"
  fi

  # One pip call, so that the requirement constrains the package's dependencies.
  if ! "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off \
    ${requirement:+"$requirement"} --editable ".${extras:+[$extras]}" >>"$venv/install.log" 2>&1; then
    printf '%s\n' "$stamp" >"$venv/hipgpt-stamp"
    environment_fail "$name"
  fi
  printf '%s\n%s\n' "$extras" "$key" >"$venv/hipgpt-stamp"
)

# Succeeds if pip can update the environment: it was created at this path, and its Python runs and is new enough.
environment_is_usable() {
  grep -qF "$1" "$1/bin/activate" 2>/dev/null &&
    "$1/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

environment_fail() {
  tail -n 5 "$1/install.log" >&2
  echo "environment: error: cannot install into $1: see above for the reason, and $1/install.log for the full log" >&2
  exit 1
}

# Prints the path of the Python to use. Runs each candidate, because one on PATH may be a shim without a Python.
environment_python() {
  local candidates=(python3 python3.13 python3.12 python3.11) candidate
  if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    "$candidate" -c "$ENVIRONMENT_PROBE" 2>/dev/null && return
  done
  echo "environment: error: no Python 3.11 or later that can make virtual environments (tried ${candidates[*]}):" \
    "install one with its venv module, or name one in the variable PYTHON" >&2
  return 1
}

# Resolves links, so that the environment's link breaks, which is detected, when this Python is removed.
ENVIRONMENT_PROBE='
import ensurepip, os, sys, venv
assert sys.version_info >= (3, 11)
print(os.path.realpath(sys.executable))
'

# Written in Python because macOS has no flock command. Continues without a lock if the file system has none.
ENVIRONMENT_LOCK='
import fcntl, sys
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("environment: waiting for another installation to end", file=sys.stderr)
    fcntl.flock(9, fcntl.LOCK_EX)
except OSError:
    pass
'
