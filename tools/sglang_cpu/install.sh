#!/usr/bin/env bash
# install.sh DIR: create DIR/venv with SGLang for the CPU (2.4 GB, a few minutes of download) unless it is up to date.
# Environment: PYTHON (tried with 3.11), TORCH (arguments of pip for torch, see the Makefile).
set -euo pipefail

if [ $# -ne 1 ]; then
  echo "usage: install.sh DIR" >&2
  exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
stamp=$1/.installed
python=${PYTHON:-python3.11}
read -r -a torch <<< "${TORCH:-torch==2.13.0}"

wanted=$(cat "$here/requirements.txt" - <<< "${torch[*]}" | sha256sum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
  touch "$stamp" # make compares its age
  exit 0
fi
mkdir -p "$1"
rm -f "$stamp" # an interrupted install leaves no stamp
test -x "$1/venv/bin/python" || "$python" -m venv "$1/venv"
# torch first and alone: packages that depend on it would select another build.
"$1/venv/bin/python" -m pip install --quiet "${torch[@]}"
"$1/venv/bin/python" -m pip install --quiet --no-deps -r "$here/requirements.txt"
printf '%s\n' "$wanted" > "$stamp"
