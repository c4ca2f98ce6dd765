# csrc/nvme_sqe.c; the docstrings are there.
from typing import Final, SupportsIndex, TypeVar, overload

from typing_extensions import Buffer

_B = TypeVar("_B", bound=Buffer)

NVME_CMD_READ: Final = 2
"""The opcode of an NVMe read command."""

def encode_nvme_read_sqe(
    namespace_id: SupportsIndex,
    starting_lba: SupportsIndex,
    blocks: SupportsIndex,
    dest_bar1_ptr: SupportsIndex,
) -> bytes: ...
@overload
def encode_nvme_read_sqes(
    namespace_id: SupportsIndex,
    starting_lbas: Buffer,
    blocks: SupportsIndex | Buffer,
    dest_bar1_ptrs: Buffer,
    out: None = None,
) -> bytes: ...
@overload
def encode_nvme_read_sqes(
    namespace_id: SupportsIndex,
    starting_lbas: Buffer,
    blocks: SupportsIndex | Buffer,
    dest_bar1_ptrs: Buffer,
    out: _B,
) -> _B: ...
def decode_nvme_read_sqe(command: Buffer, /) -> tuple[int, int, int, int]: ...
def _locate(extents: Buffer, offsets: Buffer, sizes: Buffer, /) -> bytes | None: ...
def _survey(
    offsets: Buffer, sizes: Buffer, targets: Buffer, /
) -> tuple[int, int, int, int, int, int, int, int]: ...
def _kernel_command(command: Buffer, lba_size: int, /) -> bytes: ...
