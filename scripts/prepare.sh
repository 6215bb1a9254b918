#!/usr/bin/env bash
# Makes this checkout ready to use: the locked packages in .venv, with uv (and with it the Python
# that the lock was made for) brought if they are missing. Takes no time when all is there.
#
# --launcher  also lets the commands that Ray's launcher sends over SSH (ray up, exec, submit, down)
#             find this checkout's `ray` and `python` and the cluster: one guarded block in
#             ~/.bashrc, which does nothing in shells that a person opens.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

stamp=.venv/.locked
wanted=$(cat uv.lock pyproject.toml .python-version scripts/prepare.sh | sha256sum)
if [[ ! -x .venv/bin/hcna || $(cat "$stamp" 2>/dev/null) != "$wanted" ]]; then
  [[ -d .venv ]] || echo "installing the locked environment into .venv (some minutes the first time)"
  unset VIRTUAL_ENV PYTHONPATH PYTHONHOME
  # Compiled once, here: some twenty processes start at once, and each would compile all of Ray and
  # Serve for itself, at every start where Python may not write beside its sources.
  UV_PROJECT_ENVIRONMENT=.venv "$(scripts/find_uv.sh)" sync --frozen --quiet --compile-bytecode
  printf '%s\n' "$wanted" >"$stamp"
fi
.venv/bin/python -m compileall -qq hcna_ray || true # It may belong to somebody else.

if [[ ${1:-} == --launcher ]]; then
  begin="# >>> hcna-ray: for commands of Ray's launcher >>>"
  touch ~/.bashrc
  if ! grep -qxF "$begin" ~/.bashrc; then
    kept=$(cat ~/.bashrc)
    {
      printf '%s\n' "$begin"
      # The launcher's commands all begin like this; nobody types it.
      printf 'if [[ ${BASH_EXECUTION_STRING:-} == *OMP_NUM_THREADS=1\\ PYTHONWARNINGS=ignore* ]]; then\n'
      printf '  export PATH=%q:$PATH\n' "$root/.venv/bin"
      printf '  [[ ! -r ${HCNA_HOME:-~/.hcna}/run/ray.env ]] || . "${HCNA_HOME:-$HOME/.hcna}/run/ray.env"\n'
      printf 'fi\n# <<< hcna-ray <<<\n'
      printf '%s\n' "$kept"
    } >~/.bashrc.hcna
    mv ~/.bashrc.hcna ~/.bashrc
  fi
fi
