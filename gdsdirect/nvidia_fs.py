r"""What the text of nvidia-fs's files in /proc/driver/nvidia-fs means.

Only text comes in, so that a copy from another machine is read as well as this one's. No parser
here raises, whatever the text is, and none makes up a number: what a file doesn't say is None, or
missing from its mapping, which is not the same as 0.

    >>> stats = parse_nvidia_fs_stats(
    ...     "NVFS Driver(version: 2:7:47)\n"
    ...     "IO stats: Enabled, peer IO stats: Disabled\n"
    ...     "Reads : n=10 ok=9 err=1 readMiB=40 io_state_err=0\n"
    ...     "Reads : Bandwidth(MiB/s)=12 Avg-Latency(usec)=34\n"
    ...     "Written by hand\n"
    ... )
    >>> stats.driver_version, stats.io_stats, stats.active_process
    ('2.7.47', True, None)
    >>> stats.counters["Reads"]["readMiB"], stats.counters["Reads"]["Avg-Latency(usec)"]
    (40, 34)
    >>> stats.errors, stats.unknown
    ({'Reads.err': 1}, ('Written by hand',))
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

# 20 digits hold every 64-bit counter, and keep clear of the limit above which int() raises.
_NUMBER = r"[0-9]{1,20}"
_VERSION = r"[0-9]+(?:[.:][0-9]+)*"
_ON_OR_OFF = r"(Enabled|Disabled)"

# The lines with one value, by what stands before their first colon, and how that value is written.
_VALUES = {
    "GDS Version": r"([\w.:+~-]+)",
    "NVFS statistics(ver": rf"({_VERSION})\)",
    "NVFS Driver(version": rf"({_VERSION})\)",
    "Mellanox PeerDirect Supported": r"(True|False)",
    "IO stats": rf"{_ON_OR_OFF}, peer IO stats: {_ON_OR_OFF}",
    "Logging level": r"(\w+)",
    "Active Shadow-Buffer (MiB)": rf"({_NUMBER})",
    "Active Process": rf"({_NUMBER})",
}
_LABEL = r"[A-Za-z][\w ./-]*"
_PAIR = rf"([A-Za-z][\w()%/.-]*)=({_NUMBER})(\.[0-9]{{1,20}})?"
_GPU = (
    r"(?is)GPU\s+([0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7])"
    r"\s+uuid:([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\s*:(.*)"
)
_MODULE = r"[\w.-]+"

_ERROR_LABEL = "Error"
_ERROR_KEYS = frozenset({"err", "io_state_err", "pg-cache-fail", "pg-cache-eio"})


@dataclass(frozen=True, slots=True)
class NvidiaFsGpu:
    """A GPU whose memory was registered with nvidia-fs since the module was loaded.

    `uuid` is without the "GPU-" that other tools put before it. `values` are by the driver's names:
    Registered_MiB and Cache_MiB are pinned now (Cache: by cuFile's own bounce buffers),
    max_pinned_MiB is the most that was ever pinned, and cross_root_port(%), with peer IO stats on,
    the percentage of transfers with devices below another root port. Old texts say MB for MiB.
    """

    pci_address: str
    uuid: str
    values: Mapping[str, int | float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NvidiaFsStats:
    """The statistics of nvidia-fs, from the text of /proc/driver/nvidia-fs/stats.

    None is what the text doesn't say. `gds_version` is the GDS release that the module was built
    for, `stats_version` that of the file's format, `driver_version` the module's. `peer_direct`
    is mostly a fact of how the module was built. `io_stats` and `peer_io_stats` tell whether the
    module counts transfers at all (its parameters rw_stats_enabled and peer_stats_enabled).
    `active_shadow_buffer_mib` is the host memory, in MiB, that stands for registered GPU memory,
    and `active_process` the number of processes that use the driver.

    `counters` are by line and by the driver's names, since the module was loaded or its counters
    were cleared: readMiB and writeMiB in MiB, Bandwidth(MiB/s) and the latencies (usec) over about
    the last second with transfers, the rest counts. "Ops" is what is under way now; with
    `io_stats` off it is printed but not counted, so that its 0 says nothing. Counters are unsigned
    and wrap: one that was cleared while in use can show as almost 2**32.

    `unknown` are the lines that were not understood, as they are. A line is taken whole or not at
    all, and one that contradicts an earlier line is not taken.
    """

    gds_version: str | None = None
    stats_version: str | None = None
    driver_version: str | None = None
    peer_direct: bool | None = None
    io_stats: bool | None = None
    peer_io_stats: bool | None = None
    logging_level: str | None = None
    active_shadow_buffer_mib: int | None = None
    active_process: int | None = None
    counters: Mapping[str, Mapping[str, int | float]] = field(default_factory=dict)
    gpus: tuple[NvidiaFsGpu, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def errors(self) -> dict[str, int | float]:
        """Each counter of errors that is not 0, as "Reads.err"; counted with `io_stats` off too.

        They don't add up to a number of failed transfers: one that the storage failed counts as
        both err and io_state_err, and "Error.dma-ref" counts down from 2**32.
        """
        return {
            f"{label}.{key}": value
            for label, pairs in self.counters.items()
            for key, value in pairs.items()
            if value and (label == _ERROR_LABEL or key in _ERROR_KEYS)
        }


def parse_nvidia_fs_stats(text: str) -> NvidiaFsStats:
    """What /proc/driver/nvidia-fs/stats says. Never raises, and takes linear time."""
    values: dict[str, tuple[str, ...]] = {}
    counters: dict[str, dict[str, int | float]] = {}
    gpus: list[NvidiaFsGpu] = []
    unknown: list[str] = []
    for line in text.split("\n"):  # not splitlines(): only this ends a line for the driver
        if not line.strip():
            continue
        before, _, after = line.partition(":")
        # What old texts call MB are MiB: every published driver shifts bytes by 20 bits.
        words = before.split()
        label = " ".join(words).replace("(MB)", "(MiB)")
        if label in _VALUES:
            taken = _take_value(values, label, after)
        elif words[:1] == ["GPU"]:
            taken = _take_gpu(gpus, line.strip())
        else:
            taken = _take_counters(counters, label, after)
        if not taken:
            unknown.append(line)

    io_stats = values.get("IO stats")
    driver_version = _first(values, "NVFS Driver(version")
    return NvidiaFsStats(
        gds_version=_first(values, "GDS Version"),
        stats_version=_first(values, "NVFS statistics(ver"),
        driver_version=driver_version.replace(":", ".") if driver_version else None,
        peer_direct=_is(_first(values, "Mellanox PeerDirect Supported"), "True"),
        io_stats=_is(io_stats[0], "Enabled") if io_stats else None,
        peer_io_stats=_is(io_stats[1], "Enabled") if io_stats else None,
        logging_level=_first(values, "Logging level"),
        active_shadow_buffer_mib=_number(_first(values, "Active Shadow-Buffer (MiB)")),
        active_process=_number(_first(values, "Active Process")),
        counters=counters,
        gpus=tuple(gpus),
        unknown=tuple(unknown),
    )


def parse_nvidia_fs_version(text: str) -> str | None:
    """The driver's version in /proc/driver/nvidia-fs/version, without its patch level; or None.

    >>> parse_nvidia_fs_version("version: 2.28\\n")
    '2.28'
    """
    for line in text.split("\n"):
        label, _, version = line.partition(":")
        if label.strip() == "version" and re.fullmatch(_VERSION, version.strip()):
            return version.strip().replace(":", ".")
    return None


def parse_nvidia_fs_modules(text: str) -> dict[str, str]:
    """Name and version of what registered with nvidia-fs, in /proc/driver/nvidia-fs/modules.

    Without "nvme" there is no way through nvidia-fs to NVMe drives. "wekafsio" says nothing: it is
    listed whether or not there is WekaFS. The versions are as printed, which for most modules is
    "(null)", as the driver never asks for them.

    >>> parse_nvidia_fs_modules("nvme: (null)\\nwekafsio: 1\\n")
    {'nvme': '(null)', 'wekafsio': '1'}
    """
    modules: dict[str, str] = {}
    for line in text.split("\n"):
        name, _, version = (part.strip() for part in line.partition(":"))
        if version and _match(_MODULE, name):
            modules.setdefault(name, version)
    return modules


def _match(pattern: str, text: str) -> re.Match[str] | None:
    """Compiled when it is first needed, and not at import."""
    return re.fullmatch(pattern, text, re.ASCII)


def _take_value(values: dict[str, tuple[str, ...]], label: str, text: str) -> bool:
    match = _match(_VALUES[label], " ".join(text.split()))
    return match is not None and values.setdefault(label, match.groups()) == match.groups()


def _take_gpu(gpus: list[NvidiaFsGpu], line: str) -> bool:
    match = _match(_GPU, line)
    values = _pairs(match[3]) if match else None
    if match is None or values is None:
        return False
    gpus.append(NvidiaFsGpu(match[1], match[2], values))
    return True


def _take_counters(counters: dict[str, dict[str, int | float]], label: str, text: str) -> bool:
    pairs = _pairs(text) if _match(_LABEL, label) else None
    if pairs is None:
        return False
    # With IO stats on, "Reads" and "Writes" have two lines each.
    known = counters.get(label, {})
    if any(known.get(key, value) != value for key, value in pairs.items()):
        return False
    counters[label] = known
    known.update(pairs)
    return True


def _pairs(text: str) -> dict[str, int | float] | None:
    """The key=number pairs that `text` consists of; None: there is anything else, or nothing."""
    pairs: dict[str, int | float] = {}
    for word in text.split():
        match = _match(_PAIR, word)
        if match is None:
            return None
        key, whole, fraction = match.groups()
        value = float(whole + fraction) if fraction else int(whole)
        if pairs.setdefault(key, value) != value:
            return None
    return pairs or None


def _first(values: Mapping[str, tuple[str, ...]], label: str) -> str | None:
    return values[label][0] if label in values else None


def _is(value: str | None, expected: str) -> bool | None:
    return None if value is None else value == expected


def _number(value: str | None) -> int | None:
    return None if value is None else int(value)
