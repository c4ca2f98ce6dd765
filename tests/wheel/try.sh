#!/bin/sh
# In a Debian system that has PYTHON alone: an ordinary user installs the wheel from dist/, offline, and tries it.
set -eu
if command -v cc gcc clang || find / -xdev -name 'liburing*' | grep .; then
    echo "there is a compiler or liburing here" >&2
    exit 1
fi
useradd --create-home stranger
runuser --login stranger --command "set -eu
    $1 -m venv venv
    venv/bin/pip install --quiet --no-index --find-links /mnt/dist --find-links /mnt/build/wheelhouse 'gdsdirect[cli]'
    venv/bin/python -P /mnt/tests/wheel/first_minutes.py"
