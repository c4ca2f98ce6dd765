"""Reads NVMe into GPU-visible memory, and says which way the bytes went."""

from gdsdirect._nvme_sqe import (
    NVME_CMD_READ,
    decode_nvme_read_sqe,
    encode_nvme_read_sqe,
    encode_nvme_read_sqes,
)
from gdsdirect.check import Check, Evidence, PathReport, Status, Target, Trial, Verdict
from gdsdirect.chunks import Chunk, ChunkStream, StreamProgress, stream_files
from gdsdirect.errors import (
    CudaError,
    CudaUnavailableError,
    NvmeStatusError,
    RingUnavailableError,
    ShortReadError,
    WayClosedError,
)
from gdsdirect.file import File
from gdsdirect.file import open as open
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
from gdsdirect.transfer import ReadResult

probe = GpuDirectCapability.probe

# Without `open`, so that `from gdsdirect import *` leaves Python's own in place.
__all__ = [
    "COMPLETION_FORMAT",
    "NVME_CMD_READ",
    "AsyncUringStream",
    "Available",
    "Check",
    "Chunk",
    "ChunkStream",
    "Completion",
    "CudaError",
    "CudaUnavailableError",
    "DataPath",
    "Evidence",
    "FeatureDisabled",
    "File",
    "Geometry",
    "GpuDirectCapability",
    "GpuMappedBuffer",
    "MemoryKind",
    "Namespace",
    "NvidiaFsGpu",
    "NvidiaFsStats",
    "NvmeStatusError",
    "PathReport",
    "ReadResult",
    "RingUnavailableError",
    "ShortReadError",
    "Status",
    "StreamProgress",
    "StreamStats",
    "Survey",
    "Target",
    "Tensor",
    "Trial",
    "Unavailable",
    "UnavailableReason",
    "Verdict",
    "WayClosedError",
    "WayStats",
    "decode_nvme_read_sqe",
    "encode_nvme_read_sqe",
    "encode_nvme_read_sqes",
    "parse_nvidia_fs_stats",
    "probe",
    "stream_files",
    "survey",
]
