#!/bin/sh
# The guest's first process: mounts the host's root, read-only, and runs one command in it.
#
# It stays in the initramfs, outside the root that it prepares, so that nothing the command does
# can take away what reports its status. The host adds in /etc: `modules` (what to load), `drives`
# (how many to wait for), `share` (the path of the writable folder, if any), `command` (a script).

give_up() {
    echo "lab: $*" >/dev/kmsg
    reboot -f
}

attach() { # TAG PATH OPTIONS
    mount -t 9p -o "trans=virtio,version=9p2000.L,msize=512000,$3" "$1" "$2" ||
        give_up "cannot mount $1 at $2"
}

wait_for() { # SECONDS WHAT CONDITION…
    tries=$(($1 * 50))
    what=$2
    shift 2
    until "$@"; do
        [ $((tries -= 1)) -gt 0 ] || give_up "$what did not appear"
        sleep 0.02
    done
}

drives_are_there() {
    [ "$(ls /sys/class/nvme-generic | wc -l)" -ge "$(cat /etc/drives)" ]
}

mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
modprobe -a $(cat /etc/modules) || give_up "cannot load the modules"
attach root /root ro,cache=loose

# The kernel's modules at their usual place (/lib is a link to usr/lib). Many hosts have no such
# folder to mount them on, and none can be made on a read-only root: there an overlay adds it.
if [ ! -d /root/usr/lib/modules ]; then
    mkdir -p /extra/modules
    mount -t overlay -o ro,lowerdir=/extra:/root/usr/lib lib /root/usr/lib ||
        give_up "cannot make /usr/lib/modules"
fi
attach modules /root/usr/lib/modules ro,cache=loose

mount -t devtmpfs dev /root/dev
mkdir -p /dev/pts /dev/shm
ln -s /proc/self/fd /dev/fd
ln -s /proc/self/fd/0 /dev/stdin
ln -s /proc/self/fd/1 /dev/stdout
ln -s /proc/self/fd/2 /dev/stderr
mount -t devpts devpts /root/dev/pts
mount -t proc proc /root/proc
mount -t sysfs sys /root/sys
for folder in dev/shm run; do
    mount -t tmpfs -o mode=1777 tmpfs "/root/$folder"
done
# The host's /tmp is seen, where checkouts and environments may lie, and what is written stays here.
mkdir /written
mount -t tmpfs tmpfs /written
mkdir -m 1777 /written/tmp /written/work
mount -t overlay -o lowerdir=/root/tmp,upperdir=/written/tmp,workdir=/written/work tmp /root/tmp
if [ -f /etc/share ]; then
    share=/root$(cat /etc/share)
    mkdir -p "$share"
    attach share "$share" cache=mmap
fi
ip link set lo up

wait_for 10 "the port for the output" test -c /dev/vport0p1
wait_for 10 "the port for the status" test -c /dev/vport0p2
wait_for 10 "the port for requests" test -c /dev/vport0p3
ln -s vport0p3 /dev/lab
wait_for 30 "one of the drives" drives_are_there

# A pipe between the command and the port: a port can be opened only once, and programs open
# /dev/stdout and /dev/stderr anew.
mkfifo /output
cat /output >/dev/vport0p1 &
copier=$!
sh /etc/command </dev/null >/output 2>&1
status=$?

# What the command left running holds the pipe open: a second for its last words, no more.
(sleep 1 && kill $copier) 2>/dev/null &
wait $copier
sync
echo $status >/dev/vport0p2
reboot -f
