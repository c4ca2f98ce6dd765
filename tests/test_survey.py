"""Surveys: of this machine, of machines that it is not (hosts.py), and of nonsense."""

import dataclasses
import errno
import importlib.resources
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hosts
import jsonschema
import pytest
from fake_sysfs import FakeSysfs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import run_python

from gdsdirect import DataPath, Status, Survey, Target, Verdict, survey
from gdsdirect.checks.nvidia import parse_cufile_json
from gdsdirect.checks.paths import find_mount, read_extents
from gdsdirect.host import Host, read_answers
from gdsdirect.record import RecordingHost
from gdsdirect.survey import survey_host
from gdsdirect.sysfs import Sysfs, find_extended_capability

SCRIPT = str(Path(sys.executable).with_name("gdsdirect"))
SCHEMA = json.loads(
    importlib.resources.files("gdsdirect").joinpath("survey.schema.json").read_text()
)

P2P, FILE_DIRECT = DataPath.NVME_PASSTHROUGH, DataPath.FILE_DIRECT
FALLBACKS = [DataPath.FILE_DIRECT, DataPath.FILE_FIXED, DataPath.BUFFERED]


def check(*arguments: object, **options: Any) -> tuple[int, str]:
    """Exit code and output of the installed command."""
    done = subprocess.run(
        [SCRIPT, "check", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def replay(folder: Path, *paths: str) -> Survey:
    return survey_host(Host(Sysfs(str(folder)), read_answers(str(folder))), paths, True)


def verdict(found: Survey, path: str, way: DataPath, target: Target = Target.HOST) -> Verdict:
    """The only one of its kind."""
    (report,) = (report for report in found.paths if report.path == path)
    (one,) = (one for one in report.verdicts if (one.way, one.target) == (way, target))
    return one


def status(found: Survey, name: str) -> Status:
    (one,) = (one for one in found.checks if one.name == name)
    return one.status


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(random.Random(5).randbytes(100_001))
    return path


# ---- This machine


def test_the_fallbacks_are_verified_on_a_file(data: Path) -> None:
    found = survey(data)
    assert found.exit_code == (0 if any(one.open and one.direct for one in found.verdicts) else 1)
    for way in FALLBACKS:
        one = verdict(found, str(data), way)
        if way is not DataPath.BUFFERED and not one.open:
            assert one.closed_by[0] in ("path.direct", "kernel.fixed_buffers"), one
            continue
        assert (one.open, one.verified) == (True, True)
        assert one.trial is not None
        assert one.trial.nbytes == 16384
        assert one.trial.compared_with == f"pread of {data}"
    assert not verdict(found, str(data), P2P).open
    assert verdict(found, str(data), P2P).closed_by == ("path.namespace",)


@pytest.mark.parametrize("nbytes", [1, 511, 4096, 16385])
def test_small_files_are_verified_too(tmp_path: Path, nbytes: int) -> None:
    (tmp_path / "small").write_bytes(bytes(range(1, 101)) * 200)
    os.truncate(tmp_path / "small", nbytes)
    one = verdict(survey(tmp_path / "small"), str(tmp_path / "small"), DataPath.BUFFERED)
    assert one.trial is not None
    assert (one.verified, one.trial.nbytes) == (True, min(nbytes, 16384))


def test_nothing_is_called_verified_without_a_read(data: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for found in (survey(data, verify=False), survey(tmp_path / "empty"), survey(tmp_path)):
        verdicts = [one for report in found.paths for one in report.verdicts]
        assert not any(one.verified or one.trial for one in verdicts)
        assert verdict(found, found.paths[0].path, DataPath.BUFFERED).open


def test_a_read_that_brings_other_bytes_closes_the_way(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kernel or drive that lies would; here, the bytes to compare with are spoiled."""
    from gdsdirect import trial

    monkeypatch.setattr(trial, "_pread", lambda *_: b"other bytes")
    one = verdict(survey(data), str(data), DataPath.BUFFERED)
    assert (one.open, one.verified, one.closed_by) == (False, False, ("trial",))
    assert "are not those of" in one.why
    assert survey(data).exit_code == 2


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("/dev/null", "character device null"),
        ("/no/such/file", "No such file or directory"),
        ("nul\0", "stat"),
        ("", "No such file or directory"),
        ("/dev", "on|devtmpfs|tmpfs"),
    ],
)
def test_what_cannot_be_read(path: str, what: str) -> None:
    found = survey(path)
    assert any(part in found.paths[0].what for part in what.split("|")) or what == "stat"
    if path != "/dev":
        assert found.exit_code == 2
        assert all(one.closed_by for one in found.paths[0].verdicts)
    jsonschema.validate(found.to_dict(), SCHEMA)


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert survey(tmp_path / "fifo").exit_code == 2


def test_a_file_system_without_direct_reads() -> None:
    """tmpfs takes O_DIRECT from Linux 6.6 on, and reads from memory all the same."""
    path = Path("/dev/shm", f"gdsdirect-{os.getpid()}")
    try:
        path.write_bytes(b"x" * 5000)
    except OSError:
        pytest.skip("no /dev/shm to write to")
    try:
        found = survey(path)
        assert found.paths[0].what == "tmpfs"
        assert verdict(found, str(path), DataPath.BUFFERED).verified
        assert "path.drives" in verdict(found, str(path), FILE_DIRECT, Target.PEER).closed_by
        assert "path.direct" in verdict(found, str(path), DataPath.FILE_FIXED).closed_by
    finally:
        path.unlink()


def test_as_a_command(data: Path) -> None:
    code, page = check(data)
    assert code == survey(data).exit_code
    assert page.index(f"{data}: ") < page.index("What stands in the way") < page.index("All facts")
    assert "\x1b" not in page, "colours in a pipe"
    code, text = check(data, "--json")
    answer = json.loads(text)
    jsonschema.validate(answer, SCHEMA)
    assert (answer["exit_code"], answer["schema_version"], answer["verify"]) == (code, 1, True)
    assert json.loads(check(data, "--json", "--no-verify")[1])["verify"] is False


def test_colours_on_a_terminal(data: Path) -> None:
    script = shutil.which("script")
    if script is None:
        pytest.skip("not installed: script")
    shown = subprocess.check_output([script, "-qec", f"{SCRIPT} check {data} || true", "/dev/null"])
    assert b"\x1b[32m" in shown


def test_without_a_path_and_in_time() -> None:
    """Half a second; the machine may have other things to do, so the fastest of some counts."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        code, _ = check("--no-verify")
        times.append(time.perf_counter() - start)
        assert code in (0, 1, 2)
    assert min(times) < 0.5


def test_bytes_that_are_no_text_in_a_name(tmp_path: Path) -> None:
    path = os.path.join(os.fsencode(tmp_path), b"\xff\xfe")
    with open(path, "wb") as file:
        file.write(b"x")
    done = subprocess.run([SCRIPT, "check", path], capture_output=True, check=False)
    assert (done.returncode, done.stderr) in ((0, b""), (1, b""))
    jsonschema.validate(survey(os.fsdecode(path)).to_dict(), SCHEMA)


def test_an_ordinary_user(data: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root, to become somebody else")
    data.chmod(0o600)
    script = """
import json, os, sys
from gdsdirect import survey

survey(verify=False)  # loads all that it needs, which that user may not be able to
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
print(json.dumps(survey(sys.argv[1]).to_dict()))
"""
    assert '"path.open"' in run_python(script, str(data))


# ---- Other machines


def test_an_h100_in_p2pdma_mode(tmp_path: Path) -> None:
    found = replay(hosts.h100_in_p2pdma_mode(tmp_path), hosts.FILE, "/dev/nvme0n1")
    assert found.exit_code == 0
    cufile = verdict(found, hosts.FILE, DataPath.CUFILE, Target.GPU)
    assert (cufile.open, cufile.verified) == (True, False)
    assert "P2PDMA mode" in cufile.why
    for path, way in ((hosts.FILE, FILE_DIRECT), ("/dev/nvme0n1", P2P)):
        one = verdict(found, path, way, Target.PEER)
        assert (one.open, one.verified, one.provider) == (True, False, hosts.GPU)
        assert "only its driver knows" in one.why
    assert verdict(found, hosts.FILE, DataPath.FILE_FIXED).verified
    assert status(found, "peer.route") is Status.OK


def writing(path: str, text: str) -> Callable[[Path], object]:
    """What gives a file of a recording another content."""
    return lambda root: (root / path).write_text(text)


@pytest.mark.parametrize(
    ("spoil", "name", "remedy"),
    [
        (
            writing("proc/driver/nvidia/params", 'RegistryDwords: ""\n'),
            "nvidia.static_bar1",
            "RMForceStaticBar1=1;RmForceDisableIomapWC=1",
        ),
        (
            writing("proc/driver/nvidia/params", 'RegistryDwords: "RMForceStaticBar1=1"\n'),
            "nvidia.static_bar1",
            "RmForceDisableIomapWC=1",
        ),
        (writing("etc/cufile.json", "{}"), "nvidia.cufile_json", '"use_pci_p2pdma": true'),
        (lambda root: (root / "etc/cufile.json").unlink(), "nvidia.cufile_json", "use_pci_p2pdma"),
        (
            writing("sys/module/nvme_core/parameters/multipath", "Y\n"),
            "nvidia.multipath",
            "multipath=N",
        ),
        (
            writing(
                "proc/driver/nvidia/version",
                "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 2025\n",
            ),
            "nvidia.kernel",
            "nvidia-open",
        ),
        (lambda root: (root / "usr/local/cuda").unlink(), "nvidia.libcufile", "libcufile"),
        (
            writing("proc/self/mountinfo", "30 1 259:1 / /data rw - btrfs /dev/nvme0n1p1 rw\n"),
            "path.cufile",
            "ext4 or XFS",
        ),
    ],
)
def test_each_setting_that_cufile_needs(
    spoil: Callable[[Path], object], name: str, remedy: str, tmp_path: Path
) -> None:
    root = hosts.h100_in_p2pdma_mode(tmp_path)
    spoil(root)
    cufile = verdict(replay(root, hosts.FILE), hosts.FILE, DataPath.CUFILE, Target.GPU)
    assert (cufile.open, cufile.closed_by) == (False, (name,))
    assert cufile.remedy is not None
    assert remedy in cufile.remedy


def test_what_the_environment_tells_cufile(tmp_path: Path) -> None:
    root = hosts.h100_in_p2pdma_mode(tmp_path)
    answers = read_answers(str(root))
    (root / "usr/local/cuda").unlink()
    (root / "etc/cufile.json").write_text("{}")

    def closed_by(**environment: str) -> tuple[str, ...]:
        told = {f"environment {name}": {"value": text} for name, text in environment.items()}
        host = Host(Sysfs(str(root)), {**answers, **told})
        found = survey_host(host, [hosts.FILE], True)
        return verdict(found, hosts.FILE, DataPath.CUFILE, Target.GPU).closed_by

    library = "/usr/local/cuda-12.8/targets/x86_64-linux/lib"
    assert closed_by() == ("nvidia.libcufile", "nvidia.cufile_json")
    assert closed_by(LD_LIBRARY_PATH=f":/opt/x:{library}") == ("nvidia.cufile_json",)
    assert closed_by(CUFILE_USE_PCIP2PDMA="true") == ("nvidia.libcufile",)
    FakeSysfs(root).write("opt/mine.json", '{"properties": {"use_pci_p2pdma": true}}')
    assert closed_by(CUFILE_ENV_PATH_JSON="/opt/mine.json") == ("nvidia.libcufile",)
    FakeSysfs(root).write("etc/ld.so.conf.d/cuda.conf", f"# a comment\n{library}\n")
    assert closed_by(CUFILE_ENV_PATH_JSON="/opt/mine.json") == ()
    FakeSysfs(root).write(
        "opt/mine.json", '{"properties": {"use_pci_p2pdma": true, "force_compat_mode": true}}'
    )
    assert closed_by(CUFILE_ENV_PATH_JSON="/opt/mine.json") == ("nvidia.cufile_json",)


def test_nvidia_fs_and_an_nvme_driver_that_is_not_registered(tmp_path: Path) -> None:
    found = replay(hosts.nvidia_fs_without_nvme(tmp_path), hosts.FILE)
    assert found.exit_code == 1
    cufile = verdict(found, hosts.FILE, DataPath.CUFILE, Target.GPU)
    assert (cufile.open, cufile.closed_by) == (False, ("nvidia.nvidia_fs_nvme",))
    assert "did not register" in cufile.why
    assert status(found, "nvidia.nvidia_fs") is Status.OK
    assert "kernel.p2pdma" in verdict(found, hosts.FILE, FILE_DIRECT, Target.PEER).closed_by
    (tmp_path / "proc/driver/nvidia-fs/modules").write_text("wekafsio: 1\nnvme: (null)\n")
    found = replay(tmp_path, hosts.FILE)
    assert found.exit_code == 0
    assert "nvidia-fs mode" in verdict(found, hosts.FILE, DataPath.CUFILE, Target.GPU).why


def test_a_container_without_udev(tmp_path: Path) -> None:
    found = replay(hosts.h100_in_p2pdma_mode(tmp_path, container=True), hosts.FILE)
    cufile = verdict(found, hosts.FILE, DataPath.CUFILE, Target.GPU)
    assert (cufile.open, cufile.closed_by) == (False, ("nvidia.udev",))
    assert cufile.remedy == "docker run --volume /run/udev:/run/udev:ro"
    assert status(found, "environment.container") is Status.WARN
    (node,) = (one for one in found.checks if one.name == "nvme.node")
    assert (node.status, node.remedy) == (Status.MISSING, "docker run --device /dev/ng0n1")


def test_a_laptop(tmp_path: Path) -> None:
    found = replay(hosts.laptop(tmp_path), hosts.FILE)
    assert found.exit_code == 1
    cufile = verdict(found, hosts.FILE, DataPath.CUFILE, Target.GPU)
    assert cufile.closed_by == ("nvidia.driver", "nvidia.gpu")
    peer = verdict(found, hosts.FILE, FILE_DIRECT, Target.PEER)
    assert peer.closed_by == ("kernel.p2pdma", "peer.providers")
    (node,) = (one for one in found.checks if one.name == "nvme.node")
    assert node.remedy == "chgrp 1000 /dev/ng0n1 && chmod g+r /dev/ng0n1"
    # Without a path, the drive is what is asked about.
    assert [report.path for report in replay(tmp_path).paths] == ["/dev/nvme0n1"]
    assert replay(tmp_path).exit_code == 2


def test_remedies_can_be_copied_into_a_shell(tmp_path: Path) -> None:
    host = hosts.FakeHost(tmp_path, "6.12.1", p2pdma=False)
    host.write("proc/self/status", "Gid:\t0\t7;reboot\t0\t0\nCapEff:\t0000000000000000\n")
    path = "/data/two words; reboot"
    host.answers[f"stat {path}"] = {"errno": 0, "kind": "file", "size": 9, "real": path}
    for number, remedy in (
        (errno.EACCES, f"chgrp $(id -g) '{path}' && chmod g+r '{path}'"),
        (errno.EPERM, f"docker run --device '{path}'"),
    ):
        host.answers[f"open {path} r"] = {"errno": number}
        one = verdict(replay(host.done(), path), path, DataPath.BUFFERED)
        assert (one.closed_by, one.remedy) == (("path.open",), remedy)


def test_a_recording_without_answers_closes_nothing(tmp_path: Path) -> None:
    """Only files, such as somebody copied by hand."""
    root = hosts.h100_in_p2pdma_mode(tmp_path)
    (root / "answers.json").unlink()
    found = replay(root)
    assert status(found, "kernel.io_uring") is Status.NOT_APPLICABLE
    assert status(found, "nvidia.static_bar1") is Status.OK
    assert found.paths[0].path == "/dev/nvme0n1"


def test_over_fabrics(tmp_path: Path) -> None:
    root = hosts.laptop(tmp_path)
    (controller,) = root.glob("sys/devices/*/*/*/nvme/nvme0")
    (controller / "transport").write_text("tcp\n")
    (controller / "address").write_text("traddr=192.0.2.7,trsvcid=4420\n")
    (one,) = (one for one in replay(root).checks if one.name == "nvme.transport")
    assert (one.status, "over fabrics (tcp)" in one.why) == (Status.MISSING, True)


@pytest.mark.parametrize(
    ("cpu", "bridge", "expected"),
    [
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 25\n", "0x1480", Status.WARN),
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 16\n", "0x1480", Status.MISSING),
        ("vendor_id\t: GenuineIntel\ncpu family\t: 6\n", "0x09a2", Status.WARN),
        ("vendor_id\t: GenuineIntel\ncpu family\t: 6\n", "0x29c0", Status.MISSING),
        ("", "", Status.MISSING),
    ],
)
def test_no_switch_in_common(cpu: str, bridge: str, expected: Status, tmp_path: Path) -> None:
    host = hosts.FakeHost(tmp_path, "6.8.0", p2pdma=True)
    host.drive(f"0000:15:01.0/{hosts.DRIVE}")
    host.gpu(f"0000:15:02.0/{hosts.GPU}", pages=True)
    host.pci("0000:15:00.0", vendor="0x8086", device=bridge)
    host.write("proc/cpuinfo", cpu)
    assert status(replay(host.done()), "peer.route") is expected


def configuration_space(control: int, serial: bytes = b"") -> bytes:
    """An Express device's, with ACS and a serial number."""
    config = bytearray(4096)
    config[0x100:0x104] = (0x0003 | 1 << 16 | 0x140 << 20).to_bytes(4, "little")
    config[0x104 : 0x104 + len(serial)] = serial
    config[0x140:0x144] = (0x000D | 1 << 16).to_bytes(4, "little")
    config[0x146] = control
    return bytes(config)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (configuration_space(0x1D), Status.MISSING),
        (configuration_space(0x11), Status.OK),
        (bytes(64), Status.OK),
        (bytes(4096), Status.OK),
    ],
)
def test_access_control_on_the_switch(config: bytes, expected: Status, tmp_path: Path) -> None:
    root = hosts.h100_in_p2pdma_mode(tmp_path)
    port = "sys/devices/pci0000:15/0000:15:01.0/0000:16:00.0/0000:17:01.0"
    FakeSysfs(root).write(f"{port}/config", config)
    FakeSysfs(root).link("sys/bus/pci/devices/0000:17:01.0", port)
    found = replay(root)
    assert status(found, "peer.route") is expected
    if expected is Status.MISSING:
        (one,) = (one for one in found.checks if one.name == "peer.route")
        assert one.remedy == "boot with pci=disable_acs_redir=0000:17:01.0"


def test_a_loop_of_capabilities_ends() -> None:
    config = bytearray(4096)
    config[0x100:0x104] = (0x0001 | 1 << 16 | 0x100 << 20).to_bytes(4, "little")
    assert find_extended_capability(bytes(config), 0x0D) is None


# ---- What stands in the way


@pytest.mark.parametrize(
    ("setup", "files", "why", "remedy"),
    [
        (
            errno.EPERM,
            {"proc/sys/kernel/io_uring_disabled": "2\n"},
            "kernel.io_uring_disabled is 2",
            "sysctl -w kernel.io_uring_disabled=0",
        ),
        (
            errno.EPERM,
            {
                "proc/sys/kernel/io_uring_disabled": "1\n",
                "proc/self/status": "CapEff:\t0000000000000000\nSeccomp:\t0\n",
            },
            "kernel.io_uring_disabled is 1",
            "sysctl -w kernel.io_uring_disabled=0",
        ),
        (
            errno.EPERM,
            {
                "proc/sys/kernel/io_uring_disabled": "0\n",
                "proc/self/status": "CapEff:\t0000000000000000\nSeccomp:\t2\nSeccomp_filters:\t1\n",
            },
            "a seccomp filter refuses it",
            "profile",
        ),
        (errno.ENOSYS, {}, "built without io_uring", "CONFIG_IO_URING=y"),
        (errno.EMFILE, {}, "no descriptor is free", "ulimit -n"),
    ],
)
def test_why_there_is_no_ring(
    setup: int, files: dict[str, str], why: str, remedy: str, tmp_path: Path
) -> None:
    host = hosts.FakeHost(tmp_path, "6.12.1", p2pdma=False)
    host.answers["io_uring"] = {"setup": setup, "enter": setup}
    for path, text in files.items():
        host.write(path, text)
    found = replay(host.done())
    (one,) = (one for one in found.checks if one.name == "kernel.io_uring")
    assert one.status is Status.MISSING
    assert why in one.why
    assert one.remedy is not None
    assert remedy in one.remedy
    assert found.exit_code == 2


@pytest.mark.parametrize(
    ("limits", "capable", "expected"),
    [
        (
            "Max locked memory         8388608              8388608              bytes\n",
            "0",
            "warn",
        ),
        (
            "Max locked memory         8388608              8388608              bytes\n",
            "4000",
            "ok",
        ),
        ("Max locked memory         unlimited            unlimited            bytes\n", "0", "ok"),
        ("Max locked memory         many\n", "0", "warn"),
        ("", "0", "warn"),
    ],
)
def test_memlock(limits: str, capable: str, expected: str, tmp_path: Path) -> None:
    host = hosts.FakeHost(tmp_path, "6.12.1", p2pdma=False)
    host.write("proc/self/limits", f"Limit  Soft Limit  Hard Limit  Units\n{limits}")
    host.write("proc/self/status", f"CapEff:\t{capable:>016}\n")
    assert status(replay(host.done()), "kernel.memlock").value == expected


# ---- Files and what is below them


def test_the_nearest_mount(tmp_path: Path) -> None:
    FakeSysfs(tmp_path).write(
        "proc/self/mountinfo",
        "20 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        "21 20 8:2 / /data rw - xfs /dev/sda2 rw\n"
        "22 20 8:3 / /data\\040two rw master:1 - ext4 /dev/sda3 rw\n"
        "23 20 8:4 / /data rw - btrfs /dev/sda4 rw\n"
        "nonsense\n",
    )
    host = Host(Sysfs(str(tmp_path)), {})
    for path, kind in (
        *(("/data/x", "btrfs"), ("/data", "btrfs"), ("/database", "ext4")),
        *(("/data two/x", "ext4"), ("/", "ext4")),
    ):
        mount = find_mount(host, path)
        assert mount is not None
        assert (path, mount.kind) == (path, kind)


def stacked(tmp_path: Path, slaves: dict[str, str]) -> Survey:
    """A file on md0, which is made of these devices: the name, and where it is."""
    host = hosts.FakeHost(tmp_path, "6.12.1", p2pdma=True)
    host.drive(f"0000:15:01.0/{hosts.DRIVE}")
    md = host.device("sys/devices/virtual/block/md0", "block", "9:0")
    for name, directory in slaves.items():
        if not (tmp_path / directory).exists():
            host.device(directory, "block")
        host.link(f"{md}/slaves/{name}", directory)
    host.answers[f"stat {hosts.FILE}"]["dev"] = "9:0"
    return replay(host.done(), hosts.FILE)


NVME = f"sys/devices/pci0000:15/0000:15:01.0/{hosts.DRIVE}/nvme/nvme0/nvme0n1"


def test_a_raid_of_nvme_partitions(tmp_path: Path) -> None:
    found = stacked(tmp_path, {"nvme0n1p1": f"{NVME}/nvme0n1p1"})
    assert found.paths[0].what == "ext4 on md0 on nvme0n1p1"
    (drives,) = (one for one in found.paths[0].checks if one.name == "path.drives")
    assert drives.status is Status.WARN
    assert "/dev/nvme0n1" in drives.why


def test_a_raid_with_another_disk(tmp_path: Path) -> None:
    slaves = {"nvme0n1p1": f"{NVME}/nvme0n1p1", "sda": "sys/devices/pci0000:15/ata1/block/sda"}
    (drives,) = (
        one for one in stacked(tmp_path, slaves).paths[0].checks if one.name == "path.drives"
    )
    assert drives.status is Status.MISSING


def test_a_stack_that_goes_in_circles(tmp_path: Path) -> None:
    found = stacked(tmp_path, {"md0": "sys/devices/virtual/block/md0"})
    assert found.paths[0].what.startswith("ext4 on md0 on md0")


def test_an_overlay(tmp_path: Path) -> None:
    host = hosts.FakeHost(tmp_path, "6.12.1", p2pdma=True)
    host.drive(f"0000:15:01.0/{hosts.DRIVE}")
    mount = (
        "40 1 0:50 / / rw - overlay overlay rw,lowerdir=/low:/data/image,upperdir=/up,workdir=/w\n"
    )
    host.write("proc/self/mountinfo", (tmp_path / "proc/self/mountinfo").read_text() + mount)
    inside = {**host.answers[f"stat {hosts.FILE}"], "dev": "0:50", "real": "/opt/model"}
    host.answers["stat /opt/model"] = inside
    host.answers["stat /up/opt/model"] = {"errno": errno.ENOENT}
    host.answers["stat /data/image/opt/model"] = {**inside, "dev": "259:1"}
    found = replay(host.done(), "/opt/model")
    assert found.paths[0].what == "overlay on the layer /data/image on nvme0n1p1"
    del host.answers["stat /data/image/opt/model"]
    found = replay(host.done(), "/opt/model")
    assert found.paths[0].what == "overlay on a layer that can't be seen from here"


def test_extents_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        for start in (0, 1 << 20, 3 << 20):
            file.seek(start)
            file.write(b"x" * 4096)
        file.flush()
        os.fsync(file.fileno())
    try:
        found = read_extents(str(path))
    except OSError as error:
        pytest.skip(f"this file system tells no extents: {error}")
    assert found == {"count": 3, "flags": []}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", {}),
        ("nonsense", None),
        ("[" * 100_000, None),
        ("[1]", {}),
        ('{"properties": 3}', {}),
        (
            '{"properties": {"use_pci_p2pdma": true, // a comment with "quotes"\n'
            '"allow_compat_mode": false, "x": "http://no.comment"}}',
            {"properties.use_pci_p2pdma": True, "properties.allow_compat_mode": False},
        ),
    ],
)
def test_cufile_json(text: str, expected: dict[str, Any] | None) -> None:
    assert parse_cufile_json(text) == expected


# ---- Recording


def without_evidence(answer: str) -> Any:
    """Of which a recording has only what could be kept."""

    def drop(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in pairs if key != "evidence"}

    return json.loads(answer, object_pairs_hook=drop)


def test_a_recording_says_the_same(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "recording"
    code, recorded = check(data, "--json", "--record", folder)
    again, replayed = check("--json", "--replay", folder)
    assert (again, without_evidence(replayed)) == (code, without_evidence(recorded))


def test_a_recording_without_paths(tmp_path: Path) -> None:
    folder = tmp_path / "recording"
    code, recorded = check("--json", "--record", folder)
    again, replayed = check("--json", "--replay", folder)
    assert (again, json.loads(replayed)["verdicts"]) == (code, json.loads(recorded)["verdicts"])


def test_a_recording_goes_into_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    done = subprocess.run(
        [SCRIPT, "check", "--record", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert "new or an empty folder" in done.stderr
    assert os.listdir(tmp_path) == ["mine"]


@pytest.mark.parametrize("content", [b"nonsense", b"[]", b"\xff"])
def test_a_replay_of_something_else(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "answers.json").write_bytes(content)
    for folder in (tmp_path, tmp_path / "missing"):
        done = subprocess.run(
            [SCRIPT, "check", "--replay", str(folder)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1


SECRETS = {
    "serial": b"S6EXNX0T900123",
    "uuid": b"fb1e6550-2a78-d767-1f0d-7512eb8c552d",
    "pci serial": bytes.fromhex("0102030405060708"),
    "host": b"ada.example.org",
    "network": b"192.0.2.7",
    "server": b"storage.example.org",
    "builder": b"root@ada",
    "other mount": b"/media/ada",
}


def test_a_recording_does_not_tell_whose_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine with everything that could tell, surveyed as if it were this one."""
    machine = FakeSysfs(hosts.h100_in_p2pdma_mode(tmp_path / "machine"))
    port = "sys/devices/pci0000:15/0000:15:01.0/0000:16:00.0/0000:17:01.0"
    machine.write(f"{port}/config", configuration_space(0x1D, SECRETS["pci serial"]))
    machine.link("sys/bus/pci/devices/0000:17:01.0", port)
    (controller,) = machine.root.glob("sys/devices/*/*/*/*/*/nvme/nvme0")
    fabric = machine.device(
        "sys/devices/virtual/nvme-fabrics/ctl/nvme1",
        "nvme",
        "242:1",
        address="traddr=192.0.2.7,trsvcid=4420,host_traddr=192.0.2.8",
        model="Linux",
        transport="tcp",
    )
    machine.namespace(fabric, "nvme1n1", "ng1n1", 9)
    machine.link("sys/class/nvme-generic/ng1n1", f"{fabric}/ng1n1")
    for folder in (controller, machine.root / fabric):
        (folder / "serial").write_bytes(SECRETS["serial"])
        (folder / "subsysnqn").write_bytes(b"nqn.2014-08.org.nvmexpress:" + SECRETS["serial"])
    stats = (Path(__file__).parent / "samples/nvidia-fs-stats-2.25.7.txt").read_bytes()
    assert SECRETS["uuid"] in stats
    machine.write("proc/driver/nvidia-fs/stats", stats)
    machine.write("proc/driver/nvidia-fs/version", "version: 2.25\n")
    machine.write(
        "proc/driver/nvidia/version",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  "
        "(root@ada)  Thu Jan 23 22:50:36 UTC 2025\n",
    )
    machine.write("proc/sys/kernel/osrelease", "6.8.0-ada.example.org\n")
    machine.write(
        "proc/self/mountinfo",
        "30 1 259:1 / /data rw - ext4 /dev/nvme0n1p1 rw,data=ordered\n"
        "31 1 0:40 / /data/models rw - nfs4 storage.example.org:/export rw,addr=192.0.2.7\n"
        "32 1 8:1 / /media/ada/stick rw - vfat /dev/sda1 rw\n",
    )
    cufile = '{"rdma_dev_addr_list": ["192.0.2.7"], "properties": {"use_pci_p2pdma": true}}'
    machine.write("home/mine.conf", cufile)
    machine.write("proc/cpuinfo", "vendor_id\t: GenuineIntel\nserial\t: S6EXNX0T900123\n")

    monkeypatch.setattr(platform, "node", lambda: "ada.example.org")
    answers = json.loads((machine.root / "answers.json").read_text())
    remote = {**answers[f"stat {hosts.FILE}"], "real": "/data/models/x", "dev": "0:40"}
    answers["stat /data/models/x"] = remote
    answers["environment CUFILE_ENV_PATH_JSON"] = {"value": "/home/mine.conf"}
    recording = RecordingHost(str(machine.root), answers)
    before = survey_host(recording, [hosts.FILE, "/data/models/x"], True)
    recording.write(str(tmp_path / "recording"))

    told = b"".join(p.read_bytes() for p in (tmp_path / "recording").rglob("*") if p.is_file())
    for name, secret in SECRETS.items():
        assert secret not in told, name
        assert secret.decode("latin-1") not in str(list((tmp_path / "recording").rglob("*"))), name
    after = replay(tmp_path / "recording", hosts.FILE, "/data/models/x")
    assert [summary(report) for report in after.paths] == [summary(r) for r in before.paths]


def summary(report: Any) -> list[tuple[Any, ...]]:
    return [(v.way, v.target, v.open, v.verified, v.closed_by) for v in report.verdicts]


# ---- Nonsense


NONSENSE = st.one_of(
    st.binary(max_size=64),
    st.sampled_from(
        [
            *(b"", b"\0", b"-1\n", b"9" * 5000, b"\xff\xfe\n", "²\n".encode(), b"0x\n", b"Y"),
            *(b"1:99999999999", b"99999:99999\n", b"16.0 GT/s PCIe\n", b"a=b=c,d:e\n"),
        ]
    ),
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_files_can_hold_anything(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("nonsense")
    build = data.draw(
        st.sampled_from([hosts.h100_in_p2pdma_mode, hosts.nvidia_fs_without_nvme, hosts.laptop])
    )
    build(root)
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    for path in data.draw(st.lists(st.sampled_from(files), min_size=1, max_size=6)):
        if path.name == "answers.json":
            continue
        old = path.read_bytes()
        junk = data.draw(NONSENSE)
        at = data.draw(st.integers(0, len(old)))
        path.write_bytes(data.draw(st.sampled_from([junk, old[:at] + junk + old[at:], old[:at]])))
    found = replay(root, hosts.FILE, "/dev/nvme0n1", "/dev/ng0n1", "/data")
    jsonschema.validate(found.to_dict(), SCHEMA)
    shutil.rmtree(root)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_answers_can_be_anything(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("answers")
    hosts.h100_in_p2pdma_mode(root)
    answers = json.loads((root / "answers.json").read_text())
    for key in data.draw(st.lists(st.sampled_from(sorted(answers)), min_size=1, max_size=5)):
        if isinstance(answers[key], dict) and answers[key] and data.draw(st.booleans()):
            inner = data.draw(st.sampled_from(sorted(answers[key])))
            answers[key][inner] = data.draw(JSON)
        else:
            answers[key] = data.draw(JSON)
    answers["asked"] = data.draw(JSON | st.just([hosts.FILE, "/dev/nvme0n1"]))
    found = survey_host(Host(Sysfs(str(root)), answers), [], True)
    jsonschema.validate(found.to_dict(), SCHEMA)
    shutil.rmtree(root)


def test_no_files_at_all(tmp_path: Path) -> None:
    """A container without /sys and /proc, on a system where nothing answers."""
    found = survey_host(Host(Sysfs(str(tmp_path)), {}), [], True)
    assert [report.path for report in found.paths] == [""]
    jsonschema.validate(found.to_dict(), SCHEMA)


def test_the_schema_has_every_field() -> None:
    """A new field is not forgotten, nor a new way."""
    definitions = SCHEMA["$defs"]
    ways = definitions["verdict"]["properties"]["way"]["enum"]
    assert set(ways) == {way.value for way in DataPath}
    assert set(definitions["verdict"]["properties"]) == {
        f.name for f in dataclasses.fields(Verdict)
    }
    assert set(definitions["check"]["properties"]["status"]["enum"]) == {s.value for s in Status}
    assert set(definitions["verdict"]["properties"]["target"]["enum"]) == {t.value for t in Target}
