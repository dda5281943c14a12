# Creates or updates a virtual environment in the repository's root, with uv if it is installed, else with pip; source
# it there. If the environment is current, this takes a few milliseconds and starts no Python. Works with Bash 3.2.

# environment NAME [EXTRAS]
# Installs this package in ./NAME, editable, with at least EXTRAS ("dev,peers"). On failure, prints an
# error on stderr and exits. Writes nothing to stdout.
environment() {
  cd -P . || exit # resolve symbolic links, so that $PWD is unique
  environment_is_current "$@" || environment_install "$@" 9<>scripts/environment.sh || exit
}

# Compares the stamp, which is written last: the extras on its first line, then the key.
environment_is_current() {
  local venv=$PWD/$1 wanted=${2:-} stamp extra
  [[ -x $venv/bin/python && -r $venv/hipgpt-stamp ]] || return
  stamp=$(<"$venv/hipgpt-stamp")
  [[ ${stamp#*$'\n'} == "$(environment_key "$1")" ]] || return
  for extra in ${wanted//,/ }; do
    [[ ,${stamp%%$'\n'*}, == *,$extra,* ]] || return
  done
}

# Prints all that an environment depends on besides its extras: its path and pyproject.toml.
environment_key() {
  printf '%s\n%s' "$PWD/$1" "$(<pyproject.toml)"
}

# Only one installation runs at a time: file descriptor 9 holds the lock until this subshell ends. A killed installation
# leaves the stamp "unfinished", and the next one starts from scratch. If the installation fails, for example without a
# network, the previous stamp is restored.
environment_install() (
  trap 'exit 130' INT # pip turns Ctrl-C into an ordinary failure
  name=$1 venv=$PWD/$1 extras=${2:-} stamp='' SECONDS=0
  python=$(environment_python) && "$python" -c "$ENVIRONMENT_LOCK" || exit 1
  if environment_is_current "$@"; then exit; fi # another process has just installed it

  create=("$python" -m venv) install=("$venv/bin/python" -m pip install --no-input --progress-bar off) with=pip
  if uv --version >/dev/null 2>&1; then # with pip in the environment, for its user
    create=(uv venv --seed --allow-existing --python "$python") install=(uv pip install --python "$venv/bin/python")
    with=uv
  fi
  key=$(environment_key "$1")
  if [[ -r $venv/hipgpt-stamp ]]; then stamp=$(<"$venv/hipgpt-stamp"); fi
  if [[ $stamp != unfinished ]] && environment_is_usable "$venv" "$with"; then
    installed=${stamp%%$'\n'*}
    for extra in ${installed//,/ }; do
      [[ ,$extras, == *,$extra,* ]] || extras=${extras:+$extras,}$extra
    done
    environment_say "updating $name from pyproject.toml${extras:+ with extras $extras}"
  else
    environment_say "creating $name with $python and $with: downloads JAX and its libraries once (1 GB, minutes)"
    stamp=unfinished
    mkdir -p "$venv" && echo "$stamp" >"$venv/hipgpt-stamp" || exit 1
    find "$venv/." -mindepth 1 -maxdepth 1 ! -name hipgpt-stamp -exec rm -rf {} +
  fi
  echo unfinished >"$venv/hipgpt-stamp" && : >"$venv/install.log" || exit 1

  if [[ -t 2 ]]; then
    environment_show_progress "$venv/install.log" 9>&- &
    trap "kill $! 2>/dev/null; printf '\r\e[K' >&2" EXIT
  fi
  [[ -x $venv/bin/python ]] || "${create[@]}" "$venv" >>"$venv/install.log" 2>&1 || environment_fail "$name"
  if ! "${install[@]}" --editable ".${extras:+[$extras]}" >>"$venv/install.log" 2>&1; then
    printf '%s\n' "$stamp" >"$venv/hipgpt-stamp"
    environment_fail "$name"
  fi
  printf '%s\n%s\n' "$extras" "$key" >"$venv/hipgpt-stamp"
  environment_say "$name is ready after $SECONDS s"
)

# Succeeds if the environment can be updated: it was created at this path, and its Python runs and is new enough.
environment_is_usable() {
  local modules=sys
  if [[ $2 == pip ]]; then modules=pip,sys; fi
  grep -qF "$1" "$1/bin/activate" 2>/dev/null &&
    "$1/bin/python" -c "import $modules; sys.exit(sys.version_info < (3, 11))" 2>/dev/null
}

# Shows the time and the last line of the log on the terminal until the script ends.
environment_show_progress() {
  while kill -0 $$ 2>/dev/null; do
    printf '\r%4d s  %.70s\e[K' "$SECONDS" "$(tail -n 1 "$1")" >&2
    sleep 1
  done
}

# Prints a line on stderr, in place of the progress on a terminal.
environment_say() {
  if [[ -t 2 ]]; then printf '\r\e[K' >&2; fi
  echo "environment: $1" >&2
}

environment_fail() {
  environment_say "the last lines of $1/install.log:"
  tail -n 5 "$1/install.log" >&2
  environment_say "error: cannot install into $1: see above for the reason, and $1/install.log for the full log"
  exit 1
}

# Prints the path of the Python to use. Runs each candidate, because one on PATH may be a shim without a Python.
environment_python() {
  local candidates=(python3 python3.13 python3.12 python3.11) candidate
  if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    "$candidate" -c "$ENVIRONMENT_PROBE" 2>/dev/null && return
  done
  environment_say "error: no Python 3.11 or later that can make virtual environments (tried ${candidates[*]}): \
install one with its venv module, or name one in the variable PYTHON"
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
