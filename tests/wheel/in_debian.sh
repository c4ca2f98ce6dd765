#!/bin/sh
# Runs a command in a throwaway copy of a Debian system that has nothing but a CPython:
#
#     tests/wheel/in_debian.sh SUITE PYTHON 'PACKAGES' COMMAND...
#
# debootstrap makes the system once, in ~/.cache/gdsdirect-debian. PACKAGES are installed into the copy alone, which
# lives in memory. COMMAND finds the current folder in /mnt.
set -eu
[ "$(id -u)" = 0 ] || exec sudo "$0" "$@"
suite=$1 python=$2 packages=$3
system=${XDG_CACHE_HOME:-$HOME/.cache}/gdsdirect-debian/$suite-$python
if [ -z "${IN_NAMESPACE:-}" ]; then
    if [ ! -e "$system" ]; then
        mkdir -p "$system.copy"
        rm -rf "$system.new"
        debootstrap --variant=minbase --include="$python,$python-venv" "$suite" "$system.new" >"$system.log" ||
            { tail "$system.log" >&2; exit 1; }
        mv "$system.new" "$system"
    fi
    IN_NAMESPACE=1 exec unshare --mount --pid --fork --kill-child "$0" "$@"
fi
shift 3
copy=$system.copy
mount -t tmpfs tmpfs "$copy"
mkdir "$copy/upper" "$copy/work" "$copy/root"
mount -t overlay overlay -o "lowerdir=$system,upperdir=$copy/upper,workdir=$copy/work" "$copy/root"
cp /etc/resolv.conf "$copy/root/etc/"
mount -t proc proc "$copy/root/proc"
mount --rbind /dev "$copy/root/dev"
mount --rbind /sys "$copy/root/sys"
mount --bind . "$copy/root/mnt"
if [ -n "$packages" ]; then
    # A mirror may be some days behind; what it has is signed all the same.
    chroot "$copy/root" apt-get -qq -o Acquire::Check-Valid-Until=false update
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive chroot "$copy/root" \
        apt-get -qq -o Dpkg::Use-Pty=0 install --no-install-recommends $packages >/dev/null
fi
exec chroot "$copy/root" "$@"
