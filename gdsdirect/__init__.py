"""Reads NVMe into GPU-visible memory, and says which way the bytes went."""

from typing import TYPE_CHECKING

from gdsdirect._nvme_sqe import (
    NVME_CMD_READ,
    decode_nvme_read_sqe,
    encode_nvme_read_sqe,
    encode_nvme_read_sqes,
)
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
from gdsdirect.survey import survey
from gdsdirect.tensor import Tensor
from gdsdirect.transfer import ReadResult

if TYPE_CHECKING:
    from gdsdirect.check import (
        Check,
        Evidence,
        PathReport,
        Status,
        Survey,
        Target,
        Trial,
        Verdict,
    )
    from gdsdirect.nvidia_fs import NvidiaFsGpu, NvidiaFsStats, parse_nvidia_fs_stats
else:
    # The same, imported when they are asked for: few programs do, and the import is to be quick.
    def __getattr__(name):
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
        from gdsdirect import check, nvidia_fs

        return getattr(check if hasattr(check, name) else nvidia_fs, name)

    def __dir__():
        return sorted({*globals(), *__all__})


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
