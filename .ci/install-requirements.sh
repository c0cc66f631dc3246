#!/bin/sh
# install-requirements.sh LIST PINS, both beside this file: installs the listed packages into
# /opt/tandem, each by its pin and its hashes, with bytecode, because a pod can't write it later.
set -eu
cd "$(dirname "$0")"
sed -n '/^uv==/,/[^\\]$/p' "$2" | pip install --no-cache-dir --require-hashes -r /dev/stdin
uv pip install --no-cache --compile-bytecode --python /opt/tandem/bin/python --constraint "$2" -r "$1"
pip uninstall --yes uv
