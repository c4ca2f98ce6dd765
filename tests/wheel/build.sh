#!/bin/sh
# In a Debian system with a compiler: the wheel for PYTHON from dist/'s sdist, into build/dist.
set -eu
"$1" -m venv /tmp/venv
cd /mnt
GDSDIRECT_STATIC_LIBURING=1 /tmp/venv/bin/pip wheel --quiet --no-index --find-links build/wheelhouse --no-deps \
    --wheel-dir build/dist dist/*.tar.gz
