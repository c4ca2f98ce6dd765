"""The kernel's image, decompressed: under software emulation that saves 1 to 4 s a boot."""

import lzma
import struct
import subprocess
from pathlib import Path

from lab import cache
from lab.kernels import Kernel
from lab.tools import tool

# The ELF note (type 18, owner "Xen") by which QEMU enters an ELF kernel without a loader.
_ENTRY_NOTE = b"\x12\0\0\0Xen\0"

# Where a bzImage says what is in it (Documentation/arch/x86/boot.rst).
_SETUP_SECTORS = 0x1F1
_MAGIC = slice(0x202, 0x206)
_PAYLOAD = 0x248


def bootable(kernel: Kernel) -> Path:
    """The image to give to QEMU, in the cache."""
    return cache.derived(f"image-{kernel.release}", [kernel.image], lambda: _decompressed(kernel))


def _decompressed(kernel: Kernel) -> bytes:
    """The ELF file in the image; the image itself where QEMU could not start that."""
    image = kernel.image.read_bytes()
    if image[_MAGIC] != b"HdrS":
        return image
    offset, length = struct.unpack_from("<II", image, _PAYLOAD)
    start = ((image[_SETUP_SECTORS] or 4) + 1) * 512 + offset
    elf = decompressed(image[start : start + length])
    return elf if elf.startswith(b"\x7fELF") and _ENTRY_NOTE in elf else image


def decompressed(data: bytes) -> bytes:
    """What an xz or zstd stream holds, whatever follows it; other data as they are."""
    if data.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMADecompressor().decompress(data)
    if data.startswith(b"\x28\xb5\x2f\xfd"):
        # The kernel's build puts the size after the stream: zstd complains, having done its work.
        return subprocess.run([tool("zstd"), "-dcq"], input=data, capture_output=True).stdout
    return data
