"""The drives of the machine: what they are, and how QEMU is told."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_MIB = 1 << 20
# Measured on 7.3: of a 1 MiB BAR the kernel makes no peer memory, and says nothing.
_LEAST_PEER_MEMORY = 2 * _MIB
_MOST_DRIVES = 16  # a switch has 32 ports; nobody needs them


@dataclass(frozen=True)
class Drive:
    """One NVMe controller with one namespace. Sizes are in bytes.

    A field that cannot be raises ValueError with its name, its value and the remedy.
    """

    serial: str = "data"
    """How a program in the guest finds it: /sys/class/nvme/*/serial."""
    size: int = 64 * _MIB
    """Ignored when `contents` is given."""
    contents: Path | None = None
    """A raw image. The guest's writes never reach it. None: zeros."""
    block_size: int = 512
    nsid: int = 1
    """QEMU's trace tells drives apart by this alone: give each its own to attribute reads."""
    metadata: int = 0
    """Bytes beside each block; they take part of the drive's size."""
    extended_metadata: bool = False
    """The metadata follows each block's data, rather than going to a buffer of its own."""
    mdts: int = 7
    """The largest transfer is 4096 << mdts bytes; 0: no limit."""
    peer_memory: int = 0
    """Bytes of controller memory that other drives can write to, as GPU memory would be."""
    own_root_port: bool = False
    """On a root port of its own, not behind the switch that all others share."""
    read_errors: tuple[int, ...] = ()
    """Blocks that cannot be read (unrecovered read error)."""
    iops: int = 0
    """Commands a second that it executes at most, to have some in flight for long; 0: no limit."""
    instant: bool = False
    """Reads give zeros at once, and no image is looked at: to measure what is around the drive."""
    uring: bool = False
    """The image is read by io_uring, not by a thread for each command: twice as fast, to measure
    what is around the drive where zeros won't do."""

    def __post_init__(self) -> None:
        for wrong in self._faults():
            raise ValueError(wrong)

    @property
    def nbytes(self) -> int:
        """The size of the image, whichever way it was given."""
        return self.size if self.contents is None else self.contents.stat().st_size

    @property
    def blocks(self) -> int:
        """The namespace's capacity."""
        return self.nbytes // (self.block_size + self.metadata)

    def _faults(self) -> Iterator[str]:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]{0,19}", self.serial):
            yield (
                f"serial is {self.serial!r}; use a letter, then up to 19 letters, digits "
                "and any of '_.-'"
            )
        if self.block_size not in (512, 1024, 2048, 4096):
            yield f"block_size is {self.block_size}; use 512, 1024, 2048 or 4096"
        if not 1 <= self.nsid <= 256:
            yield f"nsid is {self.nsid}; use 1 to 256"
        if not 0 <= self.metadata <= 4096:
            yield f"metadata is {self.metadata}; use 0 to 4096 bytes a block"
        if self.extended_metadata and not self.metadata:
            yield "extended_metadata is True with metadata 0; give the metadata's bytes a block"
        if not 0 <= self.mdts <= 16:
            yield f"mdts is {self.mdts}; use 0 to 16 (the largest transfer is 4096 << mdts bytes)"
        if self.peer_memory and not (
            self.peer_memory >= _LEAST_PEER_MEMORY and self.peer_memory.bit_count() == 1
        ):
            yield (
                f"peer_memory is {self.peer_memory}; use 0, or a power of two of at least "
                f"{_LEAST_PEER_MEMORY} bytes"
            )
        if self.iops < 0:
            yield f"iops is {self.iops}; use 0 for no limit, or commands a second"
        if self.instant and (self.contents is not None or self.read_errors or self.uring):
            yield "instant is True with contents, read_errors or uring; leave out what zeros lack"
        yield from self._size_faults()

    def _size_faults(self) -> Iterator[str]:
        if self.contents is not None and not self.contents.is_file():
            yield f"contents is {str(self.contents)!r}, which is not a file; make the image first"
        what = "size" if self.contents is None else f"the size of contents {str(self.contents)!r}"
        if self.nbytes < self.block_size or self.nbytes % self.block_size:
            yield f"{what} is {self.nbytes}; use a multiple of block_size, {self.block_size}"
        for lba in self.read_errors:
            if not 0 <= lba < self.blocks:
                yield f"read_errors has {lba}; the drive's blocks are 0 to {self.blocks - 1}"


def check_together(drives: Sequence[Drive]) -> None:
    """ValueError when the drives, each fine by itself, cannot be in one machine."""
    serials = [drive.serial for drive in drives]
    for serial in serials:
        if serials.count(serial) > 1:
            raise ValueError(f"serial {serial!r} is given twice; give each drive its own")
    if len(drives) > _MOST_DRIVES:
        raise ValueError(f"there are {len(drives)} drives; use at most {_MOST_DRIVES}")


def make_images(drives: Sequence[Drive], folder: Path) -> None:
    """The files in `folder` that hold zeros; they take no space until written to."""
    for drive in drives:
        if drive.contents is None:
            with image_of(drive, folder).open("wb") as file:
                file.truncate(drive.size)


def qemu_arguments(drives: Sequence[Drive], folder: Path) -> list[str]:
    """The part of QEMU's command line that makes `drives`, with their images in `folder`.

    All drives are behind one PCIe switch, where peer transfers can be, except those with
    `own_root_port`. The devices' ids, for QMP: controller `SERIAL`, namespace `SERIAL.ns`.
    """
    arguments: list[str] = []
    if not all(drive.own_root_port for drive in drives):
        arguments += ["-device", "pcie-root-port,id=switch-root,chassis=1,slot=1"]
        arguments += ["-device", "x3130-upstream,id=switch-port,bus=switch-root"]
    for place, drive in enumerate(drives, 2):
        below = "pcie-root-port" if drive.own_root_port else "xio3130-downstream,bus=switch-port"
        arguments += ["-device", f"{below},id={drive.serial}.port,chassis={place},slot={place}"]
        arguments += ["-drive", _backend(drive, image_of(drive, folder))]
        arguments += ["-device", _controller(drive), "-device", _namespace(drive)]
    return arguments


def image_of(drive: Drive, folder: Path) -> Path:
    """The file with what is on a drive."""
    return folder / f"{drive.serial}.image" if drive.contents is None else drive.contents.resolve()


def _backend(drive: Drive, image: Path) -> str:
    options = [f"if=none,id={drive.serial}.image"]
    if drive.iops:
        options.append(f"throttling.iops-total={drive.iops}")
    if drive.instant:
        return ",".join([*options, f"driver=null-co,size={drive.size},read-zeroes=on"])
    options.append("format=raw,cache=unsafe")
    if drive.uring:
        options.append("aio=io_uring")
    if drive.contents is not None:
        options.append("snapshot=on")
    path = escaped(image)
    if not drive.read_errors:
        return ",".join([*options, f"file={path}"])
    options += ["file.driver=blkdebug", f"file.image.filename={path}"]
    for number, lba in enumerate(drive.read_errors):
        rule = f"file.inject-error.{number}"
        sector = lba * drive.block_size // 512  # blkdebug counts in 512 bytes, always
        options += [f"{rule}.event=none", f"{rule}.iotype=read", f"{rule}.errno=5"]
        options += [f"{rule}.sector={sector}", f"{rule}.once=off"]
    return ",".join(options)


def _controller(drive: Drive) -> str:
    return (
        f"nvme,id={drive.serial},serial={drive.serial},bus={drive.serial}.port,"
        f"mdts={drive.mdts},cmb_size_mb={drive.peer_memory // _MIB}"
    )


def _namespace(drive: Drive) -> str:
    return (
        f"nvme-ns,id={drive.serial}.ns,bus={drive.serial},drive={drive.serial}.image,"
        f"nsid={drive.nsid},logical_block_size={drive.block_size},"
        f"physical_block_size={drive.block_size},"
        f"ms={drive.metadata},mset={int(drive.extended_metadata)}"
    )


def escaped(path: Path) -> str:
    """`path` as a value in QEMU's options, where a comma is written twice."""
    return str(path).replace(",", ",,")
