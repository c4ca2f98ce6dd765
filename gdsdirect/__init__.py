"""Reads NVMe into GPU-visible memory, and says which way the bytes went."""

from gdsdirect._nvme_sqe import (
    NVME_CMD_READ,
    decode_nvme_read_sqe,
    encode_nvme_read_sqe,
    encode_nvme_read_sqes,
)
from gdsdirect.check import Check, Evidence, PathReport, Status, Target, Trial, Verdict
from gdsdirect.errors import NvmeStatusError, RingUnavailableError, ShortReadError
from gdsdirect.memory import GpuMappedBuffer, MemoryKind
from gdsdirect.namespace import Geometry, Namespace
from gdsdirect.nvidia_fs import NvidiaFsGpu, NvidiaFsStats, parse_nvidia_fs_stats
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
from gdsdirect.survey import Survey, survey
from gdsdirect.tensor import Tensor

probe = GpuDirectCapability.probe

__all__ = [
    "COMPLETION_FORMAT",
    "NVME_CMD_READ",
    "AsyncUringStream",
    "Available",
    "Check",
    "Completion",
    "DataPath",
    "Evidence",
    "FeatureDisabled",
    "Geometry",
    "GpuDirectCapability",
    "GpuMappedBuffer",
    "MemoryKind",
    "Namespace",
    "NvidiaFsGpu",
    "NvidiaFsStats",
    "NvmeStatusError",
    "PathReport",
    "RingUnavailableError",
    "ShortReadError",
    "Status",
    "StreamStats",
    "Survey",
    "Target",
    "Tensor",
    "Trial",
    "Unavailable",
    "UnavailableReason",
    "Verdict",
    "WayStats",
    "decode_nvme_read_sqe",
    "encode_nvme_read_sqe",
    "encode_nvme_read_sqes",
    "parse_nvidia_fs_stats",
    "probe",
    "survey",
]
