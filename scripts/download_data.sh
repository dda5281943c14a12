#!/usr/bin/env bash
# Downloads the tiny Shakespeare text (1.1 MB) to data/data.txt unless it exists. DATA_URL sets a mirror.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
url=${DATA_URL:-https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt}
sha256=86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed
target=data/data.txt

fail() {
  echo "download_data: error: $1" >&2
  exit 1
}

fetch() {
  if command -v curl >/dev/null; then
    curl --fail --silent --show-error --location --connect-timeout 20 --output "$1" "$url"
  elif command -v wget >/dev/null; then
    wget --quiet --timeout=20 --tries=2 --output-document="$1" "$url"
  else
    fail "neither curl nor wget is installed: put the text at $target by hand"
  fi
}

digest() {
  if command -v sha256sum >/dev/null; then sha256sum "$1"; else shasum -a 256 "$1"; fi | cut -d ' ' -f 1
}

if [[ -e $target ]]; then
  [[ $(digest "$target") == "$sha256" ]] || fail "$target holds another text: move it away, or train on it as it is"
  exit
fi
mkdir -p data
partial=$(mktemp data/.partial.XXXXXX)
trap 'rm -f "$partial"' EXIT
reason=$(fetch "$partial" 2>&1) || fail "no answer from $url${reason:+ (${reason//$'\n'/ })}: put the text at $target by hand"
found=$(digest "$partial")
[[ $found == "$sha256" ]] || fail "$url gave sha256 $found, not $sha256: put the right text at $target by hand"
chmod 644 "$partial"
mv "$partial" "$target"
echo "$target: tiny Shakespeare, sha256 as expected" >&2
