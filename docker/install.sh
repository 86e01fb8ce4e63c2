#!/usr/bin/env bash
# install.sh STEP: install one step of the image into the environment of PYTHON (python3). Tests run it without docker.
#   libraries  megatron-core, transformer-engine and the other dependencies
#   apex       NVIDIA's apex, from source
#   package    this package
# Installed packages keep their versions, with which SGLang is tested. A requirement that they do not meet ends the
# build.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
APEX_COMMIT=6424da3b4faa6c8f062da4a48c424fff3f02d42d # 2026-07-08
export PIP_BREAK_SYSTEM_PACKAGES=1 # the base's Python may be marked as externally managed

pip() {
  "$python" -m pip --no-cache-dir --disable-pip-version-check "$@"
}

# "name==version" lines of installed packages, then the pins of this repository; the first line of a name counts.
constraints() {
  { pip list --format=freeze; grep -v '^#' "$root/docker/requirements.txt"; cat "$root/constraints.txt"; } |
    grep -v '^megatron-sdsearch==' |
    awk -F'==' '!/^#/ { name = tolower($1); sub(/\[.*/, "", name); gsub(/[-_.]+/, "-", name)
                        if (!(name in seen)) { seen[name]; sub(/\[[^]]*\]/, ""); print } }'
}

dependencies() {
  "$python" -c 'import sys, tomllib
print("\n".join(tomllib.load(open(sys.argv[1], "rb"))["project"]["dependencies"]))' "$root/pyproject.toml"
}

install_libraries() {
  # transformer-engine's torch part is compiled against the installed torch, without an NCCL of its own.
  pip install --constraint "$1" pybind11 ninja wheel
  NVTE_FRAMEWORK=pytorch NVTE_WITH_NCCL_EP=0 MAX_JOBS=${MAX_JOBS:-8} \
    pip install --no-build-isolation --constraint "$1" \
    --requirement "$root/docker/requirements.txt" --requirement "$2"
}

install_apex() {
  APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_PARALLEL_BUILD=${MAX_JOBS:-8} \
    pip install --no-build-isolation --constraint "$1" "apex @ git+https://github.com/NVIDIA/apex.git@$APEX_COMMIT"
}

install_package() {
  pip install --no-deps "$root"
}

main() {
  case ${1:-} in
    libraries | apex | package) ;;
    *)
      echo "usage: install.sh libraries|apex|package" >&2
      exit 2
      ;;
  esac
  folder=$(mktemp --directory)
  trap 'rm -rf "$folder"' EXIT
  constraints > "$folder/constraints.txt"
  dependencies > "$folder/requirements.txt"
  "install_$1" "$folder/constraints.txt" "$folder/requirements.txt"
}

main "$@"
