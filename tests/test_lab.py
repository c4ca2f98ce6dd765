"""The lab: descriptions of drives, what it reads from logs and traces, and a few real boots."""

import io
import json
import os
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import needs_lab

import lab
from lab import Drive, TraceRead, control, cpio, initramfs, kernellog, kernels, trace
from lab.__main__ import drive, main
from lab.drives import check_together, qemu_arguments

MIB = 1 << 20


def arguments(*drives: Drive) -> str:
    return " ".join(qemu_arguments(drives, Path("images")))


# Drives


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("serial", "two words"),
        ("serial", "a" * 21),
        ("serial", "a,b"),
        ("size", 0),
        ("size", 1000),
        ("contents", Path("no-such-image")),
        ("block_size", 256),
        ("block_size", 3072),
        ("block_size", 8192),
        ("nsid", 0),
        ("nsid", 257),
        ("metadata", -1),
        ("extended_metadata", True),
        ("mdts", 17),
        ("peer_memory", MIB),
        ("peer_memory", 3 * MIB),
        ("peer_memory", -MIB),
        ("read_errors", (-1,)),
        ("read_errors", (64 * MIB // 512,)),
        ("iops", -1),
    ],
)
def test_a_wrong_field_is_named_with_its_value(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field) as caught:
        Drive(**{field: value})  # type: ignore[arg-type]
    shown = value[0] if isinstance(value, tuple) else value
    assert str(shown) in str(caught.value)


def test_contents_give_the_size(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(8192))
    assert Drive(contents=image, block_size=4096, size=1).blocks == 2
    image.write_bytes(bytes(8000))
    with pytest.raises(ValueError, match="8000"):
        Drive(contents=image)


def test_metadata_takes_part_of_the_size() -> None:
    assert Drive(size=520 * 512, metadata=8).blocks == 512


def test_serials_must_differ() -> None:
    with pytest.raises(ValueError, match="'data' is given twice"):
        check_together([Drive(), Drive(nsid=2)])


def test_drives_share_a_switch() -> None:
    made = arguments(Drive("one"), Drive("two", nsid=2, peer_memory=64 * MIB))
    assert made.count("x3130-upstream") == 1
    assert made.count("xio3130-downstream,bus=switch-port") == 2
    assert "nvme,id=two,serial=two,bus=two.port,mdts=7,cmb_size_mb=64" in made


def test_a_drive_on_its_own_root_port_needs_no_switch() -> None:
    made = arguments(Drive(own_root_port=True))
    assert "pcie-root-port,id=data.port" in made
    assert "x3130" not in made


def test_namespace_arguments() -> None:
    made = arguments(Drive(nsid=3, block_size=4096, metadata=8, extended_metadata=True))
    assert "nsid=3,logical_block_size=4096,physical_block_size=4096,ms=8,mset=1" in made


def test_an_image_is_never_written_to(tmp_path: Path) -> None:
    image = tmp_path / "a,b"
    image.write_bytes(bytes(512))
    assert f"snapshot=on,file={tmp_path}/a,,b" in arguments(Drive(contents=image))
    assert "snapshot" not in arguments(Drive())


def test_read_errors_are_given_in_sectors() -> None:
    made = arguments(Drive(block_size=4096, read_errors=(2, 5)))
    assert "inject-error.0.sector=16," in made
    assert "inject-error.1.sector=40," in made


def test_a_slow_drive() -> None:
    assert "throttling.iops-total=40," in arguments(Drive(iops=40))
    assert "throttling" not in arguments(Drive())


def test_an_image_that_is_read_by_io_uring() -> None:
    plain = arguments(Drive())
    assert "aio=" not in plain
    by_uring = plain.replace("cache=unsafe", "cache=unsafe,aio=io_uring")
    assert arguments(Drive(uring=True)) == by_uring


def test_an_instant_drive(tmp_path: Path) -> None:
    made = arguments(Drive(size=1 << 20, instant=True, iops=40))
    assert "throttling.iops-total=40,driver=null-co,size=1048576,read-zeroes=on" in made
    (tmp_path / "a").write_bytes(bytes(4096))
    for more in ({"contents": tmp_path / "a"}, {"read_errors": (1,)}, {"uring": True}):
        with pytest.raises(ValueError, match="instant is True with contents, read_errors or uring"):
            Drive(instant=True, **more)


# Requests


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("", "no request ''; there are unplug, plug"),
        ("jump data", "no request 'jump'"),
        ("unplug", "the request is unplug SERIAL"),
        ("unplug data now", "the request is unplug SERIAL"),
        ("plug data", "the request is plug SERIAL BYTES"),
        ("unplug other", "no drive has the serial 'other'"),
        ("plug data lots", "'lots' is not a number of bytes"),
        ("plug data -512", "'-512' is not a number of bytes"),
    ],
)
def test_a_wrong_request(request_: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        control.understood(request_, {"data": Drive()})


class Monitor:
    """Plays QEMU's part: the far ends of a Control's sockets."""

    def __init__(self, made: control.Control) -> None:
        self.control = made
        self.guest, self.monitor = (
            socket.socket(fileno=os.dup(descriptor)) for descriptor in made.descriptors
        )
        made.started()
        assert json.loads(self.monitor.recv(4096)) == {"execute": "qmp_capabilities"}

    def guest_says(self, data: bytes) -> None:
        self.guest.sendall(data)
        self._pass_on()

    def says(self, **message: object) -> None:
        self.monitor.sendall(json.dumps(message).encode() + b"\r\n")
        self._pass_on()

    def asked(self) -> list[tuple[str, dict[str, object]]]:
        """What was asked of the monitor."""
        lines = _read(self.monitor).splitlines()
        return [(line["execute"], line["arguments"]) for line in map(json.loads, lines)]

    def answers(self) -> list[str]:
        """What the guest got."""
        return _read(self.guest).decode().splitlines()

    def _pass_on(self) -> None:
        while ready := select.select(self.control.sockets, [], [], 0)[0]:
            for end in ready:
                self.control.receive(end)


def _read(end: socket.socket) -> bytes:
    return end.recv(1 << 16) if select.select([end], [], [], 0)[0] else b""


@pytest.fixture
def monitor() -> Iterator[Monitor]:
    with control.Control([Drive("one"), Drive("two")], Path("images")) as made:
        played = Monitor(made)
        yield played
        played.guest.close()
        played.monitor.close()


def test_requests_are_answered_in_their_order(monitor: Monitor) -> None:
    """One after the other, whatever the monitor says meanwhile, and however the lines arrive."""
    monitor.guest_says(b"unplug one\nunplug two\nju")
    monitor.guest_says(b"mp\n")
    assert monitor.asked() == [("device_del", {"id": "one"})]
    monitor.says(event="RESUME")
    assert monitor.answers() == []
    monitor.says(id="request", **{"return": {}})
    assert monitor.asked() == [("device_del", {"id": "two"})]
    monitor.says(id="request", error={"desc": "it is\nstuck"})
    assert monitor.answers() == [
        "ok",
        "error it is stuck",
        "error there is no request 'jump'; there are unplug, plug",
    ]


def test_only_an_empty_slot_takes_a_drive(monitor: Monitor) -> None:
    monitor.guest_says(b"plug one 512\n")
    assert monitor.answers() == ["error one is in its slot: unplug it, and wait until it is out"]
    monitor.says(event="DEVICE_DELETED", data={"path": "/machine", "device": "one"})
    for wrong in (b"0", b"513", b"%d" % (64 * MIB + 512)):
        monitor.guest_says(b"plug one " + wrong + b"\n")
        assert monitor.answers()[0].startswith(f"error {wrong.decode()} bytes for one: use blocks")
    for failed in (True, False):
        monitor.guest_says(b"plug one 1024\n")
        assert [name for name, _ in monitor.asked()] == ["blockdev-add"]
        monitor.says(id="request", **{"return": {}})
        assert [name for name, _ in monitor.asked()] == ["device_add"]
        outcome = {"error": {"desc": "no"}} if failed else {"return": {}}
        monitor.says(id="request", **outcome)
        assert monitor.answers() == ["error no" if failed else "ok"]
    monitor.guest_says(b"plug one 1024\n")
    assert monitor.answers()[0].startswith("error one is in its slot")


def test_a_guest_that_reads_no_answers_stops_nothing(
    monitor: Monitor,
) -> None:
    monitor.control._guest.settimeout(0.01)
    monitor.guest.settimeout(0.1)

    def flood() -> None:
        while True:
            monitor.guest_says(b"jump\n" * 1000)

    with pytest.raises(TimeoutError):  # nobody takes its requests any more
        flood()
    assert monitor.control.sockets == [monitor.control._monitor]


def test_the_end_of_qemu_is_no_error(monitor: Monitor) -> None:
    monitor.guest_says(b"unplug one\n")
    monitor.guest.close()
    monitor.monitor.close()
    monitor._pass_on()
    assert monitor.control.sockets == []


# Traces and logs

TRACE = """\
pci_nvme_admin_cmd cid 1 sqid 0 opc 0x6 opname 'NVME_ADM_CMD_IDENTIFY'
pci_nvme_map_addr addr 0x1000 len 4096
pci_nvme_io_cmd cid 2 nsid 0x3 sqid 1 opc 0x2 opname 'NVME_NVM_CMD_READ'
pci_nvme_read cid 2 nsid 3 nlb 24 count 12288 lba 0x1f
pci_nvme_map_addr addr 0x10000 len 4096
pci_nvme_map_addr addr 0x11000 len 4096
pci_nvme_map_addr addr 0x20000 len 4096
pci_nvme_rw_cb cid 2 blk ''
pci_nvme_map_addr addr 0x5000 len 64
not a line of the trace
123@1700000000.000001:pci_nvme_read cid 3 nsid 1 nlb 1 count 512 lba 0xffffffffff
123@1700000000.000002:pci_nvme_map_addr addr 0xf4000000 len 512
123@1700000000.000003:pci_nvme_read cid 4 nsid 1 nlb 1 count 512 lba 0x8
pci_nvme_read cid 5 nsid 1 nl"""


def test_trace() -> None:
    assert list(trace.parse(TRACE.splitlines())) == [
        TraceRead(3, 31, 24, 12288, ((0x10000, 8192), (0x20000, 4096))),
        TraceRead(1, 0xFFFFFFFFFF, 1, 512, ((0xF4000000, 512),)),
        TraceRead(1, 8, 1, 512, ()),
    ]


def test_an_empty_trace() -> None:
    assert list(trace.parse([])) == []


@pytest.mark.parametrize(
    "line",
    [
        "[    2.1] BUG: kernel NULL pointer dereference, address: 0000000000000000",
        "[    2.1] kernel BUG at mm/usercopy.c:102!",
        "[    2.1] Oops: 0000 [#1] PREEMPT SMP NOPTI",
        "[    2.1] WARNING: CPU: 0 PID: 1 at kernel/panic.c:1 f+0x1/0x2",
        "[    2.1] Kernel panic - not syncing: sysrq triggered crash",
        "[    2.1] Call Trace:",
        "[    2.1] watchdog: BUG: soft lockup - CPU#0 stuck for 26s!",
        "[    2.1] general protection fault, probably for non-canonical address",
        "[    2.1][  T137] WARNING: possible circular locking dependency detected",
        "[    2.1] INFO: task python:12 blocked for more than 120 seconds.",
        "[    2.1] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
    ],
)
def test_kernel_problems(line: str) -> None:
    assert kernellog.problems(f"[    1.0] fine\n{line}\n[    3.0] fine") == (line,)


@pytest.mark.parametrize(
    "line",
    [
        '[    1.0] PCI: Using host bridge windows; if necessary, use "pci=nocrs" and report a bug',
        "[    1.0] Kernel command line: console=ttyS0 oops=panic panic=-1",
        "[    1.0] IOMMUv2 functionality not available on this system - This is not a bug.",
        "[    1.0] DEBUG: something",
    ],
)
def test_a_healthy_kernel_has_no_problems(line: str) -> None:
    assert kernellog.problems(line) == ()


# The command line


def test_a_drive_on_the_command_line() -> None:
    assert drive("serial=peer,peer_memory=64M,own_root_port,read_errors=1:9") == Drive(
        serial="peer", peer_memory=64 * MIB, own_root_port=True, read_errors=(1, 9)
    )
    assert drive("size=1G,block_size=4096,own_root_port=no").size == 1 << 30
    assert drive("") == Drive()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour=red", "no 'colour'; it has serial, size"),
        ("size=big", "size is 'big'; use a number"),
        ("own_root_port=maybe", "own_root_port is 'maybe'; use yes, no"),
        ("nsid=0", "nsid is 0; use 1 to 256"),
    ],
)
def test_a_wrong_drive_on_the_command_line(
    text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--drive", text, "--", "true"]) == 2
    assert message in capsys.readouterr().err


def test_wrong_arguments_boot_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="command"):
        lab.run("true")
    with pytest.raises(ValueError, match="timeout is 0"):
        lab.run(["true"], timeout=0)
    with pytest.raises(ValueError, match="share is"):
        lab.run(["true"], share=tmp_path / "missing")
    with pytest.raises(ValueError, match=r"kernel is '2\.4'"):
        lab.run(["true"], kernel="2.4")
    monkeypatch.chdir("/proc")
    with pytest.raises(ValueError, match="working directory is '/proc'"):
        lab.run(["true"])


# Kernels and the initramfs


def test_a_kernel_of_ones_own(tmp_path: Path) -> None:
    with pytest.raises(lab.LabError, match="0 kernel images"):
        kernels.locate(str(tmp_path))
    (tmp_path / "lib/modules/1.2.3").mkdir(parents=True)
    (tmp_path / "lib/modules/1.2.3/modules.dep").touch()
    (tmp_path / "vmlinuz-1.2.3").touch()
    assert kernels.locate(str(tmp_path)).release == "1.2.3"


def test_archive_names_folders_before_what_is_in_them() -> None:
    made = cpio.archive([cpio.file("a/b/c", b"text"), cpio.link("a/d", "b/c")])
    order = [made.index(name) for name in (b"a\0", b"a/b\0", b"a/b/c\0", b"a/d\0", b"TRAILER!!!")]
    assert order == sorted(order)
    assert len(made) % 4 == 0


def test_the_command_reaches_the_guest_as_it_is(tmp_path: Path) -> None:
    script = initramfs._script(["echo", "it's", ""], tmp_path, {"A B": "1\n2"})
    assert script.endswith("""echo 'it'"'"'s' ''""")
    assert "'A B=1\n2'" in script


# Real boots


@pytest.fixture(params=list(kernels.SUITES))
def kernel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.lab
@needs_lab()
def test_one_run(kernel: str, tmp_path: Path) -> None:
    """Status, output, environment, share, root and drives, all in one boot of each kernel."""
    script = """
        echo out; echo err >&2; echo "$WORD"
        touch /no-file 2>/dev/null && echo root is writable
        echo kept > "$SHARE/file"
        cd /sys/class/nvme
        for name in nvme*; do
            block=$(echo /sys/class/nvme/$name/nvme*n*)
            echo $(cat $name/serial $block/nsid $block/queue/logical_block_size)
        done | sort
        exit 41
    """
    live = io.StringIO()
    result = lab.run(
        ["sh", "-c", script],
        kernel=kernel,
        drives=[Drive("one", nsid=3, block_size=4096), Drive("two", own_root_port=True)],
        share=tmp_path,
        env={"PATH": "/usr/bin:/bin", "WORD": "it's", "SHARE": str(tmp_path)},
        output=live,
    )
    assert result.output == "out\nerr\nit's\none 3 4096\ntwo 1 512\n"
    assert live.getvalue() == result.output
    assert result.status == 41
    assert result.kernel_problems == ()
    assert "Linux version" in result.kernel_log
    assert (tmp_path / "file").read_text() == "kept\n"


@pytest.mark.lab
@needs_lab()
def test_the_trace_shows_a_read_and_the_image_is_kept(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(range(256)) * 4096)
    script = """
        dd if=/dev/nvme0n1 bs=8192 skip=5 count=1 iflag=direct status=none | head -c 4 | od -An -tx1
        dd if=/dev/zero of=/dev/nvme0n1 bs=4096 count=1 oflag=direct status=none
        dd if=/dev/nvme0n1 of=/dev/null bs=512 skip=2000 count=1 iflag=direct 2>/dev/null ||
            echo unreadable
    """
    drives = [Drive(contents=image, nsid=7, read_errors=(2000,))]
    result = lab.run(["sh", "-c", script], drives=drives)
    assert result.output == " 00 01 02 03\nunreadable\n"
    reads = [read for read in result.trace if (read.lba, read.blocks) == (80, 16)]
    assert [(read.nsid, read.nbytes) for read in reads] == [(7, 8192)]
    assert sum(nbytes for _, nbytes in reads[0].addresses) == 8192
    assert image.read_bytes() == bytes(range(256)) * 4096


@pytest.mark.lab
@needs_lab()
def test_an_instant_drive_gives_zeros_and_leaves_no_trace_where_none_is_wanted() -> None:
    script = "dd if=/dev/nvme0n1 bs=4096 count=256 iflag=direct status=none | tr -d '\\0' | wc -c"
    result = lab.run(["sh", "-c", script], drives=[Drive(instant=True)], traced=False)
    assert (result.output.strip(), result.status, result.trace) == ("0", 0, ())


REQUESTS = """
import glob, os, select, time

def ask(request):
    os.write(lab, request.encode() + b"\\n")
    assert select.select([lab], [], [], 10)[0], "no answer"
    return os.read(lab, 4096).decode().strip()

def wait_for(drives):
    deadline = time.monotonic() + 10
    while len(glob.glob("/sys/class/nvme/*/nvme*n*")) != drives:
        assert time.monotonic() < deadline
        time.sleep(0.01)

lab = os.open("/dev/lab", os.O_RDWR)
print(ask("jump"))
print(ask("unplug three"))
print(ask("plug one 4096"))
for serial in ("one", "two"):
    print(serial, ask(f"unplug {serial}"))
wait_for(0)
while (answer := ask("plug two 4096")) != "ok":
    assert "is in its slot" in answer
wait_for(1)
(size,) = glob.glob("/sys/class/nvme/*/nvme*n*/size")
print(open(size).read().strip())
with open("/dev/" + size.split("/")[-2], "rb") as drive:
    print(drive.read().hex()[-16:])
"""


@pytest.mark.lab
@needs_lab()
def test_drives_are_unplugged_and_plugged_in_on_request(tmp_path: Path) -> None:
    """Behind the switch and on a port of its own; a wrong request is answered too."""
    image = tmp_path / "image"
    image.write_bytes(bytes(4088) + b"the end." + bytes(MIB - 4096))
    drives = [Drive("one", own_root_port=True), Drive("two", nsid=2, contents=image)]
    result = lab.run(["/usr/bin/python3", "-ISc", REQUESTS], drives=drives)
    assert result.output.splitlines() == [
        "error there is no request 'jump'; there are unplug, plug",
        "error no drive has the serial 'three'",
        "error one is in its slot: unplug it, and wait until it is out",
        "one ok",
        "two ok",
        "8",
        b"the end.".hex(),
    ]
    assert result.status == 0
    assert result.kernel_problems == ()


PEER_READ = """
import glob, mmap, os
(folder,) = glob.glob("/sys/bus/pci/devices/*/p2pmem/..")
first, last, _ = open(folder + "/resource").read().splitlines()[2].split()
file = os.open(folder + "/p2pmem/allocate", os.O_RDWR)
memory = mmap.mmap(file, 1 << 20)
drives = {open(f"/sys/class/nvme/{name}/serial").read().strip(): name
          for name in os.listdir("/sys/class/nvme")}
print(first, last)
for serial in ("near", "far"):
    drive = os.open(f"/dev/{drives[serial]}n1", os.O_RDONLY | os.O_DIRECT)
    try:
        print(serial, os.preadv(drive, [memory], 4 << 20))
    except OSError as error:
        print(serial, type(error).__name__)
"""


@pytest.mark.lab
@needs_lab()
def test_a_peer_transfer_goes_to_the_peers_memory() -> None:
    drives = [
        Drive("peer", nsid=1, peer_memory=64 * MIB),
        Drive("near", nsid=2),
        Drive("far", nsid=3, own_root_port=True),
    ]
    result = lab.run(["/usr/bin/python3", "-ISc", PEER_READ], drives=drives)
    bar, near, far = result.output.splitlines()
    first, last = (int(bound, 16) for bound in bar.split())
    assert (near, far) == (f"near {MIB}", "far OSError")
    reads = [read for read in result.trace if read.nsid == 2 and 8192 <= read.lba < 10240]
    assert sum(read.nbytes for read in reads) == MIB
    for read in reads:
        assert all(first <= address <= last for address, _ in read.addresses)


@pytest.mark.lab
@needs_lab()
def test_a_crash_of_the_kernel_is_told(kernel: str, capfd: pytest.CaptureFixture[str]) -> None:
    crash = "echo before; sleep 1; echo c >/proc/sysrq-trigger"
    assert main(["run", "--kernel", kernel, "--", "sh", "-c", crash]) == lab.KERNEL_PROBLEM
    out, err = capfd.readouterr()
    assert out == "before\n"
    assert "Kernel panic" in err


@pytest.mark.lab
@needs_lab()
def test_a_command_that_does_not_end() -> None:
    result = lab.run(["sleep", "1000"], timeout=8)
    assert result.timed_out
    assert result.status == lab.TIMEOUT
    assert result.seconds < 10


@pytest.mark.lab
@needs_lab()
def test_a_signal_is_a_status_as_in_a_shell() -> None:
    assert lab.run(["sh", "-c", "kill -9 $$"]).status == 128 + 9
