"""Reads NVMe into GPU-visible memory, and says which way the bytes went."""

from gdsdirect._nvme_sqe import (
    NVME_CMD_READ,
    decode_nvme_read_sqe,
    encode_nvme_read_sqe,
    encode_nvme_read_sqes,
)
from gdsdirect.errors import NvmeStatusError, RingUnavailableError, ShortReadError
from gdsdirect.memory import GpuMappedBuffer, MemoryKind
from gdsdirect.namespace import Geometry, Namespace
from gdsdirect.probe import (
    Available,
    FeatureDisabled,
    GpuDirectCapability,
    Unavailable,
    UnavailableReason,
)
from gdsdirect.stream import (
    COMPLETION_FORMAT,
    AsyncUringStream,
    Completion,
    DataPath,
    StreamStats,
    WayStats,
)

probe = GpuDirectCapability.probe

__all__ = [
    "COMPLETION_FORMAT",
    "NVME_CMD_READ",
    "AsyncUringStream",
    "Available",
    "Completion",
    "DataPath",
    "FeatureDisabled",
    "Geometry",
    "GpuDirectCapability",
    "GpuMappedBuffer",
    "MemoryKind",
    "Namespace",
    "NvmeStatusError",
    "RingUnavailableError",
    "ShortReadError",
    "StreamStats",
    "Unavailable",
    "UnavailableReason",
    "WayStats",
    "decode_nvme_read_sqe",
    "encode_nvme_read_sqe",
    "encode_nvme_read_sqes",
    "probe",
]
