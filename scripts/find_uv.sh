#!/usr/bin/env bash
# Prints the path of a uv that is new enough, and brings a private one into .tools/ if there is none.
# Needs a Python with pip or venv; needs neither root nor pipx, and leaves the system's Python alone.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
oldest=0.7.19 # The first that can build tests/plugin_example by itself.

fits() {
  local found
  found=$("$1" --version 2>/dev/null | awk '{print $2}') || return 1
  [[ $found =~ ^[0-9]+\.[0-9]+\.[0-9]+ ]] || return 1
  [[ $(printf '%s\n%s\n' "$oldest" "${BASH_REMATCH[0]}" | sort -V | head -n 1) == "$oldest" ]]
}

for uv in "$(command -v uv || true)" "$HOME/.local/bin/uv" "$root/.tools/bin/uv" \
  "$root/.tools/venv/bin/uv"; do
  if [[ -n $uv && -x $uv ]] && fits "$uv"; then
    printf '%s\n' "$uv"
    exit 0
  fi
done

say() { printf '%s\n' "$*" >&2; }

python=
for name in "${PYTHON:-}" python3.11 python3.12 python3.13 python3; do
  if [[ -n $name ]] && command -v "$name" >/dev/null &&
    "$name" -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null; then
    python=$name
    break
  fi
done
if [[ -z $python ]]; then
  say "No Python 3 was found. Install Python 3.11 with pip (Debian: apt install python3-pip)."
  exit 1
fi

say "uv is missing: bringing a private one into .tools/"
mkdir -p "$root/.tools"
export PIP_ROOT_USER_ACTION=ignore
options=(--quiet --disable-pip-version-check --no-input "uv>=$oldest")
# --target installs beside the system's Python, not into it, so an "externally managed" one agrees.
if "$python" -m pip --version >/dev/null 2>&1 &&
  "$python" -m pip install --target "$root/.tools" --upgrade "${options[@]}" >&2 &&
  fits "$root/.tools/bin/uv"; then
  printf '%s\n' "$root/.tools/bin/uv"
elif "$python" -m venv --clear "$root/.tools/venv" >&2 &&
  "$root/.tools/venv/bin/python" -m pip install "${options[@]}" >&2 &&
  fits "$root/.tools/venv/bin/uv"; then
  printf '%s\n' "$root/.tools/venv/bin/uv"
else
  say "uv could not be installed with $python. Install pip (Debian: apt install python3-pip),"
  say "or uv itself (https://docs.astral.sh/uv), and run make again."
  exit 1
fi
