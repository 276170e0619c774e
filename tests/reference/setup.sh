#!/usr/bin/env bash
# Creates, or reuses, the Python environment of the reference scripts and prints its python as the last line.
#   python=$(tests/reference/setup.sh | tail -n 1)
# About 4.5 GB and a minute the first time (torch's wheel needs its CUDA libraries to import), nothing after that.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${ATELIER_CACHE:-$HOME/.cache/atelier}
venv=$cache/reference-venv-$(sha256sum "$here/requirements.txt" | cut -c1-12)

if [ ! -e "$venv/ready" ]; then
  mkdir -p "$cache"
  exec 9>"$venv.lock"
  flock 9 # a second caller waits here and then finds the environment made
  if [ ! -e "$venv/ready" ]; then
    rm -rf "$venv"
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r "$here/requirements.txt" >&2
    "$venv/bin/python" -c 'import torch, transformers, peft, gguf; torch.ones(2, 2) @ torch.ones(2, 2)' >&2
    touch "$venv/ready"
  fi
fi
echo "$venv/bin/python"
