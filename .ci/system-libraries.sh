#!/bin/sh
# system-libraries.sh PYTHON: what the tests' packages need of the system and don't bring along.
# Mooncake's transfer engine is linked with libibverbs, whether or not there is RDMA.
set -eu
"$1" -c 'import ctypes; ctypes.CDLL("libibverbs.so.1")' 2>/dev/null && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "==> apt-get install libibverbs1"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update --quiet --quiet
    apt-get install --yes --quiet --quiet --no-install-recommends libibverbs1 >/dev/null
else
    echo "The tests of the transport mooncake need libibverbs.so.1: install it, for example with" \
        "'sudo apt-get install libibverbs1' or 'sudo dnf install libibverbs'."
fi
