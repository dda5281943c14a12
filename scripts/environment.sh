# Makes a virtual environment in the repository's root, or brings a stale one up to date; to be sourced there.
# Where there is nothing to do it takes a few milliseconds and starts no Python. Bash 3.2 suffices.

# environment NAME [EXTRAS [REQUIREMENT]]
# Afterwards ./NAME holds this package, editable, with at least EXTRAS ("dev,peers"), resolved together with
# REQUIREMENT. Exits with a line on stderr where that cannot be had; writes nothing to stdout.
environment() {
  cd -P . || exit # one place has one name, also where links lead to it
  environment_is_current "$@" || environment_install "$@" 9<>scripts/environment.sh || exit
}

# Reads the stamp, which is written last: the extras in its first line, then the key.
environment_is_current() {
  local venv=$PWD/$1 wanted=${2:-} stamp extra
  [[ -x $venv/bin/python && -r $venv/hipgpt-stamp ]] || return
  stamp=$(<"$venv/hipgpt-stamp")
  [[ ${stamp#*$'\n'} == "$(environment_key "$@")" ]] || return
  for extra in ${wanted//,/ }; do
    [[ ,${stamp%%$'\n'*}, == *,$extra,* ]] || return
  done
}

# What an environment depends on besides its extras, literally: its place, the requirement, the project.
environment_key() {
  printf '%s\n%s\n%s' "$PWD/$1" "${3:-}" "$(<pyproject.toml)"
}

# One installation at a time: the lock is on file descriptor 9 and ends with this subshell. A killed installation
# leaves the stamp "unfinished", and the next begins anew; one that pip gave up, for want of a network, spoils nothing.
environment_install() (
  trap 'exit 130' INT # pip makes Ctrl-C a mere failure
  name=$1 venv=$PWD/$1 extras=${2:-} requirement=${3:-} stamp=''
  python=$(environment_python) && "$python" -c "$ENVIRONMENT_LOCK" || exit 1
  if environment_is_current "$@"; then exit; fi # another process has just made it

  key=$(environment_key "$@")
  if [[ -r $venv/hipgpt-stamp ]]; then stamp=$(<"$venv/hipgpt-stamp"); fi
  if [[ $stamp != unfinished ]] && environment_is_usable "$venv"; then
    installed=${stamp%%$'\n'*}
    for extra in ${installed//,/ }; do
      [[ ,$extras, == *,$extra,* ]] || extras=${extras:+$extras,}$extra
    done
    echo "environment: bringing $name up to date with pyproject.toml${extras:+ and its extras $extras}" >&2
    echo unfinished >"$venv/hipgpt-stamp"
    : >"$venv/install.log"
  else
    echo "environment: making $name with $python: once, some minutes, to fetch JAX and its libraries (1 GB)" >&2
    stamp=unfinished
    mkdir -p "$venv" && echo "$stamp" >"$venv/hipgpt-stamp" || exit 1
    find "$venv/." -mindepth 1 -maxdepth 1 ! -name hipgpt-stamp -exec rm -rf {} +
    "$python" -m venv "$venv" >"$venv/install.log" 2>&1 || environment_fail "$name"
  fi

  # Resolved in one go, so that the requirement decides.
  if ! "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off \
    ${requirement:+"$requirement"} --editable ".${extras:+[$extras]}" >>"$venv/install.log" 2>&1; then
    printf '%s\n' "$stamp" >"$venv/hipgpt-stamp"
    environment_fail "$name"
  fi
  printf '%s\n%s\n' "$extras" "$key" >"$venv/hipgpt-stamp"
)

# Whether pip can go on in an environment: made for this place, with a Python that still runs and is new enough.
environment_is_usable() {
  grep -qF "$1" "$1/bin/activate" 2>/dev/null &&
    "$1/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

environment_fail() {
  tail -n 5 "$1/install.log" >&2
  echo "environment: error: cannot install into $1: the reason stands above, the whole log in $1/install.log" >&2
  exit 1
}

# Prints the path of the Python to use. Each candidate is run: a name on PATH may be a shim with nothing behind it.
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

# Beyond links, so that the environment's own link breaks, and is seen to, when this Python is removed.
ENVIRONMENT_PROBE='
import ensurepip, os, sys, venv
assert sys.version_info >= (3, 11)
print(os.path.realpath(sys.executable))
'

# In Python because macOS has no flock; a file system without locks is no reason to stop.
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
