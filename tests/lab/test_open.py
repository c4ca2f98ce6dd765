"""gdsdirect.open of all that there is here: the way it picks, and right bytes whatever is asked."""

import asyncio
import errno
import os
import random
from pathlib import Path

import pytest
from guest import DRIVES, KIB, MIB
from reading import read_and_compare, read_randomly

import gdsdirect
from gdsdirect import DataPath, File, GpuMappedBuffer, NvmeStatusError, WayClosedError, stream_files

AS_A_FILE = (DataPath.FILE_FIXED, DataPath.FILE_DIRECT, DataPath.BUFFERED)


def written(folder: Path, name: str, nbytes: int = MIB + 12345) -> tuple[Path, bytes]:
    """A new file with random bytes, which nobody has told to go to the drive."""
    path, data = folder / name, random.Random(name).randbytes(nbytes)
    path.write_bytes(data)
    return path, data


# ---- Every way


def test_on_a_drive(file_system: Path, buffer: GpuMappedBuffer) -> None:
    path, data = written(file_system, "random")
    read_randomly(path, data, buffer, [None, *AS_A_FILE], 60, file_system)
    with File(path) as file:
        result = read_and_compare(file, buffer, data, 0, MIB, 0)
        assert (result.path, result.why, result.bounce_bytes) == (DataPath.FILE_FIXED, None, 0)
    path.unlink()


@pytest.mark.parametrize("name", ["overlay", "looped"])
def test_on_another(name: str, buffer: GpuMappedBuffer, request: pytest.FixtureRequest) -> None:
    path, data = written(request.getfixturevalue(name), "random")
    read_randomly(path, data, buffer, [None, *AS_A_FILE], 20, name)
    path.unlink()


def test_in_memory(tmpfs: Path, buffer: GpuMappedBuffer) -> None:
    path, data = written(tmpfs, "random")
    read_randomly(path, data, buffer, [None, DataPath.BUFFERED], 20, "tmpfs")
    with File(path) as file:
        result = read_and_compare(file, buffer, data, 1, 100_000, 0)
        assert result.path is DataPath.BUFFERED
        assert "in memory" in str(result.why) or "takes no O_DIRECT" in str(result.why)
        with pytest.raises(WayClosedError, match="FILE_FIXED, its file system"):
            file.read_into(buffer, size=1, require=DataPath.FILE_FIXED)


@pytest.mark.parametrize("serial", ["data", "small"])
def test_a_namespace(serial: str, buffer: GpuMappedBuffer) -> None:
    drive = DRIVES[serial]
    read_randomly(drive.generic, drive.image, buffer, [None, DataPath.NVME_PASSTHROUGH], 60, serial)
    with File(drive.generic) as file:
        assert file.size == len(drive.image)
        result = read_and_compare(file, buffer, drive.image, 4096, 64 * KIB, 0)
        assert (result.path, result.why) == (DataPath.NVME_PASSTHROUGH, None)
        end = read_and_compare(file, buffer, drive.image, len(drive.image) - 700, 5000, 0)
        assert end.nbytes == 700
        with pytest.raises(WayClosedError, match="is read by passthrough only"):
            file.read_into(buffer, size=1, require=AS_A_FILE)


def test_a_block_device_and_a_partition(buffer: GpuMappedBuffer) -> None:
    disk = DRIVES["far"].disk
    read_randomly(disk, DRIVES["far"].image, buffer, [None, *AS_A_FILE], 20, "disk")
    part = DRIVES["far"].contents([(64, 1024)])
    read_randomly(f"{disk}p1", part, buffer, [None, *AS_A_FILE], 20, "partition")


# ---- What fails


def test_a_bad_block(buffer: GpuMappedBuffer) -> None:
    """By passthrough the drive's own status, else the kernel's errno; and no way but that."""
    drive = DRIVES["broken"]
    bad = drive.read_errors[1]
    with File(drive.generic) as file:
        with pytest.raises(NvmeStatusError, match="Unrecovered") as caught:
            file.read_into(buffer, offset=(bad - 5) * 512 + 7, size=10 * 512)
        assert caught.value.filename == str(drive.generic)
        read_and_compare(file, buffer, drive.image, (bad + 1) * 512, 3000, 0)
    with File(drive.disk) as file:
        for way in (DataPath.FILE_FIXED, DataPath.FILE_DIRECT, None):
            with pytest.raises(OSError, match="reading 512 bytes at offset") as failed:
                file.read_into(buffer, offset=bad * 512, size=512, require=way)
            assert failed.value.errno in (errno.EIO, errno.ENODATA)
            assert failed.value.filename == str(drive.disk)
        read_and_compare(file, buffer, drive.image, (bad + 1) * 512, 3000, 0)


# ---- Streams and tasks


def test_a_stream(file_system: Path, buffer: GpuMappedBuffer) -> None:
    path, data = written(file_system, "streamed", 3 * MIB + 77)
    with gdsdirect.open(path) as file, file.stream(buffer, offset=5) as stream:
        assert b"".join(bytes(chunk.view) for chunk in stream) == data[5:]
        assert set(stream.progress.ways) == {DataPath.FILE_FIXED}
    path.unlink()


def test_a_namespace_in_chunks(buffer: GpuMappedBuffer) -> None:
    drive = DRIVES["data"]
    with gdsdirect.open(drive.generic) as file:
        with file.stream(buffer, offset=700, size=3 * MIB, chunk_size=100_000) as stream:
            found = b"".join(bytes(chunk.view) for chunk in stream)
        assert found == drive.image[700 : 700 + 3 * MIB]
        assert set(stream.progress.ways) == {DataPath.NVME_PASSTHROUGH}


def test_many_files(file_system: Path, buffer: GpuMappedBuffer) -> None:
    folder, chance = file_system / "many", random.Random("many")
    folder.mkdir()
    files = {}
    for number in range(80):
        size = chance.choice((0, 1, 4096, 10_000, 200_000 if number % 20 == 0 else 5))
        path, files[str(path)] = written(folder, str(number), size)
    os.sync()
    with stream_files(files, buffer, chunk_size=64 * KIB) as stream:
        found: dict[str, bytes] = {}
        for chunk in stream:
            found[chunk.file] = found.get(chunk.file, b"") + bytes(chunk.view)
        assert found == files
        assert set(stream.progress.ways) == {DataPath.FILE_FIXED}


def test_tasks(file_system: Path, buffer: GpuMappedBuffer) -> None:
    path, data = written(file_system, "tasks")

    async def one(file: File, view: memoryview, number: int) -> None:
        offset, target = 1000 * number, 16 * KIB * number
        result = await file.read_into_async(
            buffer, offset=offset, size=16 * KIB, target_offset=target
        )
        assert view[target : target + result.nbytes] == data[offset : offset + 16 * KIB]

    async def main() -> None:
        with File(path) as file, File(DRIVES["data"].generic) as raw, buffer.view() as view:
            await asyncio.gather(*(one(file, view, number) for number in range(32)))
            result = await raw.read_into_async(buffer, offset=3, size=MIB)
            assert view[: result.nbytes] == DRIVES["data"].image[3 : 3 + MIB]
            async with file.stream(buffer) as stream:
                assert b"".join([bytes(chunk.view) async for chunk in stream]) == data

    asyncio.run(main())
    path.unlink()
