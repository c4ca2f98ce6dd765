"""The reader of /sys and /proc: the machine's own, and trees of files for what it does not have."""

from __future__ import annotations

import doctest
import gzip
import os
from pathlib import Path

import pytest
from fake_sysfs import FakeSysfs

from gdsdirect import sysfs as sysfs_module
from gdsdirect.sysfs import Device, NvmeNamespaceNodes, PeerMemoryProvider, Sysfs


@pytest.fixture
def fake(tmp_path: Path) -> FakeSysfs:
    return FakeSysfs(tmp_path)


def test_examples() -> None:
    result = doctest.testmod(sysfs_module)
    assert result.failed == 0
    assert result.attempted > 0


def test_real_null_device() -> None:
    device = Sysfs().device("char", os.stat("/dev/null").st_rdev)
    assert device is not None
    assert (device.name, device.subsystem) == ("null", "mem")
    assert Sysfs().read(device.directory, "dev") == "1:3"


def test_device_that_is_not_there(fake: FakeSysfs) -> None:
    assert Sysfs().device("char", os.makedev(4095, 1 << 19)) is None
    assert fake.sysfs.device("char", os.makedev(1, 3)) is None


def test_device_without_a_subsystem(fake: FakeSysfs) -> None:
    fake.write("sys/devices/odd/dev", "9:9\n")
    fake.link("sys/dev/char/9:9", "sys/devices/odd")
    assert fake.sysfs.device("char", os.makedev(9, 9)) == Device("/sys/devices/odd", None)


def test_read(fake: FakeSysfs) -> None:
    fake.write("sys/model", "QEMU NVMe Ctrl     \n")
    fake.write("sys/odd", b"\xffx\n")
    fake.write("sys/long", b"x" * (1 << 20))
    assert fake.sysfs.read("sys/model") == "QEMU NVMe Ctrl"
    assert fake.sysfs.read("sys/odd") == "\ufffdx"
    assert fake.sysfs.read("sys/missing") is None
    assert fake.sysfs.read("sys") is None
    assert fake.sysfs.read("sys/nul\0") is None
    long = fake.sysfs.read("sys/long")
    assert long is not None
    assert len(long) == 1 << 16


@pytest.mark.parametrize(
    ("text", "value"),
    [("512\n", 512), ("0\n", 0), ("", None), ("0x10", None), ("none\n", None)],
)
def test_read_int(fake: FakeSysfs, text: str, value: int | None) -> None:
    fake.write("sys/number", text)
    assert fake.sysfs.read_int("sys/number") == value
    assert fake.sysfs.read_int("sys/missing") is None


def test_entries_are_in_the_order_of_their_numbers(fake: FakeSysfs) -> None:
    for name in ("nvme10", "nvme2", "nvme0"):
        fake.write(f"sys/{name}", "")
    assert fake.sysfs.entries("sys") == ("nvme0", "nvme2", "nvme10")
    assert fake.sysfs.entries("missing") == ()
    assert fake.sysfs.entries("sys/nvme0") == ()


def nodes_of(fake: FakeSysfs, kind: str, number: str) -> NvmeNamespaceNodes | None:
    major, minor = map(int, number.split(":"))
    device = fake.sysfs.device(kind, os.makedev(major, minor))
    assert device is not None
    return fake.sysfs.nvme_namespace(device)


def test_namespace_of_one_controller(fake: FakeSysfs) -> None:
    controller = fake.controller(0, "0000:03:00.0")
    fake.namespace(controller, "nvme0n1", "ng0n1", 0)
    disk = fake.namespace(controller, "nvme0n2", "ng0n2", 1)
    expected = NvmeNamespaceNodes(
        generic="ng0n2",
        generic_number=os.makedev(241, 1),
        disk=f"/{disk}",
        controllers=(f"/{controller}",),
    )
    assert nodes_of(fake, "char", "241:1") == expected
    assert nodes_of(fake, "block", "259:1") == expected


def test_nodes_are_paired_by_parent_where_their_numbers_differ(fake: FakeSysfs) -> None:
    # With nvme_core.multipath=Y a private namespace's disk counts subsystems, its generic device
    # controllers (nvme_alloc_ns, nvme_add_ns_cdev): nvme0n1 belongs to ng1n1, not to ng0n1.
    first = fake.controller(0, "0000:03:00.0")
    second = fake.controller(1, "0000:04:00.0")
    fake.namespace(first, "nvme1n1", "ng0n1", 0)
    fake.namespace(second, "nvme0n1", "ng1n1", 1)
    nodes = nodes_of(fake, "block", "259:1")
    assert nodes is not None
    assert nodes.generic == "ng1n1"
    assert nodes.controllers == (f"/{second}",)


def test_multipath_namespace_belongs_to_its_subsystem(fake: FakeSysfs) -> None:
    paths = [fake.controller(index, f"0000:{index:02x}:00.0") for index in (2, 10)]
    subsystem = fake.device("sys/devices/virtual/nvme-subsystem/nvme-subsys0", "nvme-subsystem")
    for path in paths:
        fake.link(f"{subsystem}/{os.path.basename(path)}", path)
    fake.device(f"{paths[0]}/nvme0c2n1", "block")
    disk = fake.namespace(subsystem, "nvme0n1", "ng0n1", 0)
    expected = NvmeNamespaceNodes(
        generic="ng0n1",
        generic_number=os.makedev(241, 0),
        disk=f"/{disk}",
        controllers=tuple(f"/{path}" for path in paths),
    )
    assert nodes_of(fake, "char", "241:0") == expected
    assert nodes_of(fake, "block", "259:0") == expected


def test_namespace_without_a_generic_device(fake: FakeSysfs) -> None:
    fake.namespace(fake.controller(0, "0000:03:00.0"), "nvme0n1", None, 0)
    nodes = nodes_of(fake, "block", "259:0")
    assert nodes is not None
    assert (nodes.generic, nodes.generic_number) == (None, None)


def test_what_is_no_namespace(fake: FakeSysfs) -> None:
    controller = fake.controller(0, "0000:03:00.0")
    disk = fake.namespace(controller, "nvme0n1", "ng0n1", 0)
    fake.device(f"{disk}/nvme0n1p1", "block", "259:5", partition="1")
    fake.device("sys/devices/virtual/block/loop0", "block", "7:0")
    # A name is no proof: this one belongs to no controller.
    fake.device("sys/devices/virtual/block/nvme7n1", "block", "7:1")
    assert nodes_of(fake, "char", "242:0") is None
    assert nodes_of(fake, "block", "259:5") is None
    assert nodes_of(fake, "block", "7:0") is None
    assert nodes_of(fake, "block", "7:1") is None


def test_generic_names_of_a_controller(fake: FakeSysfs) -> None:
    controller = fake.controller(0, "0000:03:00.0")
    fake.namespace(controller, "nvme0n10", "ng0n10", 1)
    fake.namespace(controller, "nvme0n2", "ng0n2", 0)
    device = fake.sysfs.device("char", os.makedev(242, 0))
    assert device is not None
    assert fake.sysfs.nvme_generic_names(device) == ("ng0n2", "ng0n10")


CONFIG_WITH = "# Linux/x86 6.12\nCONFIG_PCI=y\nCONFIG_PCI_P2PDMA=y\nCONFIG_NVME_CORE=m\n"
CONFIG_WITHOUT = "# Linux/x86 6.12\nCONFIG_PCI=y\n# CONFIG_PCI_P2PDMA is not set\n"
CONFIG_UNMET = "# Linux/x86 6.12\nCONFIG_PCI=y\nCONFIG_NVME_CORE=m\n"


@pytest.mark.parametrize(
    ("config", "expected"), [(CONFIG_WITH, True), (CONFIG_WITHOUT, False), (CONFIG_UNMET, False)]
)
@pytest.mark.parametrize("place", ["boot/config-6.12.1", "lib/modules/6.12.1/config"])
def test_p2pdma_by_configuration(fake: FakeSysfs, place: str, config: str, expected: bool) -> None:
    fake.write(place, config)
    assert fake.sysfs.kernel_has_p2pdma().enabled is None, "whose configuration it is, is not known"
    fake.write("proc/sys/kernel/osrelease", "6.12.1\n")
    assert fake.sysfs.kernel_has_p2pdma().enabled is expected


@pytest.mark.parametrize(
    ("config", "expected"), [(CONFIG_WITH, True), (CONFIG_WITHOUT, False), (CONFIG_UNMET, False)]
)
def test_p2pdma_by_the_running_kernels_configuration(
    fake: FakeSysfs, config: str, expected: bool
) -> None:
    fake.write("proc/config.gz", gzip.compress(config.encode()))
    # The running kernel's word goes before that of a file with its name.
    fake.write("proc/sys/kernel/osrelease", "6.12.1\n")
    fake.write("boot/config-6.12.1", CONFIG_WITHOUT if expected else CONFIG_WITH)
    assert fake.sysfs.kernel_has_p2pdma().enabled is expected


def test_p2pdma_with_an_unreadable_configuration(fake: FakeSysfs) -> None:
    fake.write("proc/config.gz", b"not gzip")
    assert fake.sysfs.kernel_has_p2pdma().enabled is None
    fake.write("proc/sys/kernel/osrelease", "6.12.1\n")
    fake.write("boot/config-6.12.1", "")
    assert fake.sysfs.kernel_has_p2pdma().enabled is None


def test_p2pdma_configuration_is_unpacked_no_further_than_its_bound(fake: FakeSysfs) -> None:
    bomb = b"\n" * (1 << 28) + CONFIG_WITH.encode()
    fake.write("proc/config.gz", gzip.compress(bomb, 1))
    assert fake.sysfs.kernel_has_p2pdma().enabled is None


@pytest.mark.parametrize(
    ("symbols", "expected"),
    [
        ("0000000000000000 T pci_p2pdma_add_resource\n0000000000000000 T x\n", True),
        ("0000000000000000 T x\n", False),
        ("0000000000000000 T __pfx_pci_p2pdma_add_resource\n", False),
        ("0000000000000000 T pci_p2pdma_add_resource_of_mine\n", False),
        ("", None),
    ],
)
def test_p2pdma_by_symbol(fake: FakeSysfs, symbols: str, expected: bool | None) -> None:
    fake.write("proc/kallsyms", symbols)
    assert fake.sysfs.kernel_has_p2pdma().enabled is expected


def test_p2pdma_of_an_endless_list_of_symbols_is_unknown(fake: FakeSysfs) -> None:
    fake.write("proc/kallsyms", "")
    os.truncate(fake.root / "proc/kallsyms", 1 << 32)
    assert fake.sysfs.kernel_has_p2pdma().enabled is None


def test_p2pdma_of_this_kernel_agrees_with_its_symbols() -> None:
    answer = Sysfs().kernel_has_p2pdma().enabled
    symbols = Path("/proc/kallsyms")
    if not symbols.exists() or not (text := symbols.read_text()):
        pytest.skip("/proc/kallsyms is hidden")
    assert answer is (" pci_p2pdma_add_resource\n" in text)


def test_peer_memory_providers(fake: FakeSysfs) -> None:
    for address, size, available, published in (
        ("0000:0a:00.0", "67108864", "67043328", "1"),
        ("0000:03:00.0", "0", "0", "0"),
    ):
        p2pmem = f"sys/bus/pci/devices/{address}/p2pmem"
        fake.write(f"{p2pmem}/size", f"{size}\n")
        fake.write(f"{p2pmem}/available", f"{available}\n")
        fake.write(f"{p2pmem}/published", f"{published}\n")
    fake.write("sys/bus/pci/devices/0000:00:00.0/vendor", "0x8086\n")
    assert fake.sysfs.peer_memory_providers() == (
        PeerMemoryProvider("0000:03:00.0", 0, 0, published=False),
        PeerMemoryProvider("0000:0a:00.0", 67108864, 67043328, published=True),
    )


def test_no_peer_memory_where_there_is_no_pci(fake: FakeSysfs) -> None:
    assert fake.sysfs.peer_memory_providers() == ()
