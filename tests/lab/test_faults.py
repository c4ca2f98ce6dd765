"""What drives and processes do when they fail: every read comes back once, and tells the truth."""

import errno
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO

import flying
import guest
import pytest
from guest import DRIVES, VICTIMS

import gdsdirect
from gdsdirect import (
    AsyncUringStream,
    Completion,
    Geometry,
    GpuMappedBuffer,
    Namespace,
    NvmeStatusError,
)

Open = Callable[[str], Namespace]

# ---- Blocks that can't be read


@pytest.mark.parametrize("register", [None, False])
def test_media_errors_in_a_batch_larger_than_the_ring(
    register: bool | None, open_namespace: Open
) -> None:
    """Those commands fail with what the drive said, and all others deliver, all over the batch."""
    namespace, drive = open_namespace("broken"), DRIVES["broken"]
    extents = [extent for most in (1, 5, 8) for extent in guest.pieces(0, drive.blocks, most)]
    random.Random(8).shuffle(extents)
    bad = {
        index
        for index, (lba, blocks) in enumerate(extents)
        if any(lba <= error < lba + blocks for error in drive.read_errors)
    }
    assert 3 * len(drive.read_errors) - 3 <= len(bad) < len(extents) // 100
    with (
        GpuMappedBuffer.from_host_visible(3 * len(drive.image)) as buffer,
        AsyncUringStream(buffer, depth=16, register=register) as stream,
    ):
        tokens = guest.submit(stream, namespace, extents)
        done = stream.wait(len(tokens), timeout=60)
        assert sorted(completion.user_data for completion in done) == list(tokens)
        by_index = {completion.user_data - tokens[0]: completion for completion in done}
        assert {index for index, completion in by_index.items() if not completion.ok} == bad
        assert (stream.stats.failed, stream.stats.completed) == (len(bad), len(done) - len(bad))
        offset = 0
        for index, extent in enumerate(extents):
            if index in bad:
                check_media_error(by_index[index], drive, extent)
            else:
                guest.check(buffer, drive.contents([extent]), offset)
            offset += extent[1] * drive.block_size


def check_media_error(completion: Completion, drive: guest.Drive, extent: guest.Extent) -> None:
    with pytest.raises(NvmeStatusError, match=f"reading LBA {extent[0]}\\b") as caught:
        completion.result()
    error = caught.value
    assert completion.nbytes == 0
    assert (error.sct, error.sc, error.name) == (2, 0x81, "Unrecovered Read Error")
    assert (error.starting_lba, error.blocks) == extent
    assert (error.namespace, error.namespace_id) == (str(drive.generic), drive.nsid)


# ---- A process with reads in flight

MANY = 100
"""Of its 256."""


@dataclass
class Flight:
    """A process of flying.py, and what it says."""

    drive: guest.Drive
    process: subprocess.Popen[str]
    report: Path

    @property
    def output(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout

    def expect(self, line: str) -> None:
        """The next line that the process prints, or what it died of."""
        said = self.output.readline().strip()
        assert said == line, self.process.communicate(timeout=30)

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def to_the_end(self, before_the_second: Callable[[], object] = lambda: None) -> list["Round"]:
        """Both rounds, when it has ended by itself, with status 0 and nothing to complain of."""
        self.expect("all came back")
        before_the_second()
        self.go_on()
        self.expect("the first came back")
        self.expect("all came back")
        assert self.process.communicate(timeout=30) == ("", "")
        assert self.process.returncode == 0
        lines = self.report.read_text().splitlines()
        rounds = [Round(self.drive, **json.loads(line)) for line in lines]
        for each in rounds:
            each.check()
        return rounds


@dataclass
class Round:
    """What became of its reads."""

    drive: guest.Drive
    tokens: list[int]
    reads: list[tuple[float, int, int, int, str]]
    """When it came back, the token, bytes, errno or 0, the error's text."""
    contents: str
    """The buffer's, in hexadecimal digits."""
    inflight: int
    failed: int

    def check(self) -> None:
        """Every read came back once, with its bytes or an error that says which it was."""
        assert sorted(token for _, token, *_ in self.reads) == self.tokens
        assert self.inflight == 0
        size = flying.BLOCKS * self.drive.block_size
        found, expected = bytes.fromhex(self.contents), self.drive.image
        for _, token, nbytes, number, text in self.reads:
            place = token - self.tokens[0]
            lba, at = place * flying.BLOCKS, place * size
            if number:
                assert nbytes == 0
                last = lba + flying.BLOCKS - 1
                assert f"reading LBA {lba}..{last} of namespace {self.drive.nsid}: " in text
            else:
                assert nbytes == size
                assert found[at : at + size] == expected[at : at + size], f"LBA {lba} is wrong"

    def errors(self) -> Counter[int]:
        """How many reads failed, by errno."""
        return Counter(number for _, _, _, number, _ in self.reads if number)

    def after(self, moment: float) -> int:
        """How many came back after that moment."""
        return sum(when > moment for when, *_ in self.reads)

    def last(self) -> float:
        return max(when for when, *_ in self.reads)


@contextmanager
def in_flight(serial: str, folder: Path) -> Iterator[Flight]:
    """A process whose reads of that drive are in flight, but a few."""
    drive, report = VICTIMS[serial], folder / "report"
    process = subprocess.Popen(
        [sys.executable, "-P", "-W", "error", flying.__file__, str(drive.generic), str(report)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            flight = Flight(drive, process, report)
            flight.expect("the first came back")
            yield flight
        finally:
            process.kill()


def test_a_slow_drive_holds_up_no_other(data: Namespace, buffer: GpuMappedBuffer) -> None:
    """It makes 200 reads a second; the other gets all of its own meanwhile, in half of the ring."""
    extents = guest.pieces(0, 64, 1)
    guest.record(buffer, data.nsid, extents)
    with (
        Namespace(VICTIMS["slow"].generic) as slow,
        AsyncUringStream(buffer, depth=8) as stream,
    ):
        batches = [
            (namespace, guest.packed(namespace, extents, buffer.address))
            for namespace in (slow, data)
        ]
        slow_tokens, fast_tokens = stream.submit_nvme_passthroughs(batches)
        order = [completion.user_data for completion in stream.wait(128)]
        assert sorted(order) == [*slow_tokens, *fast_tokens]
        assert order.index(fast_tokens[-1]) < order.index(slow_tokens[32])


def test_a_read_that_is_given_up(buffer: GpuMappedBuffer) -> None:
    """It may write into its buffer until it comes back: so nobody gets the buffer before."""
    drive = VICTIMS["slow"]
    with (
        GpuMappedBuffer.from_host_visible(65536) as target,
        Namespace(drive.generic) as slow,
        AsyncUringStream(buffer, register=False) as busy,
        gdsdirect.open(drive.generic) as file,
        gdsdirect.open(DRIVES["data"].generic) as other,
    ):
        # 100 reads, which take it half a second, stand before ours.
        busy.submit_nvme_passthrough(slow, guest.packed(slow, [(0, 1)] * 100, buffer.address))
        with pytest.raises(TimeoutError, match=r"the read did not come back in 0\.05 s"):
            file.read_into(target, size=65536, timeout=0.05)
        with pytest.raises(BufferError, match="reads in flight"):
            target.close()
        began = time.monotonic()
        other.read_into(target, size=4096)
        assert time.monotonic() > began + 0.05
        guest.check(target, DRIVES["data"].image[:4096])
        assert len(busy.wait(100)) == 100


def test_a_drive_pulled_out(tmp_path: Path) -> None:
    """Its reads come back at once, those not done with an error; later ones are refused."""
    with in_flight("pulled", tmp_path) as flight:
        pulled = time.monotonic()
        guest.pull(flight.drive)
        assert not guest.is_there(flight.drive)
        during, afterwards = flight.to_the_end()
    assert during.last() < pulled + 5
    assert during.after(pulled) >= MANY, "they weren't in flight"
    assert during.errors().total() == during.failed >= MANY
    assert set(during.errors()) <= {errno.EINTR, errno.ENODEV, errno.EIO}
    assert afterwards.errors() == {errno.ENODEV: flying.ONCE_MORE}


def test_a_drive_that_is_asked_to_go(tmp_path: Path) -> None:
    """The kernel lets it finish: all that was in flight is delivered, and then nothing more."""
    with in_flight("unplugged", tmp_path) as flight:
        asked = time.monotonic()
        assert guest.answer_to("unplug unplugged") == "ok"
        gone = partial(guest.wait_until, lambda: not guest.is_there(flight.drive), "it is gone")
        during, afterwards = flight.to_the_end(gone)
    assert during.after(asked) >= MANY, "they weren't in flight"
    assert during.errors() == {}
    assert afterwards.errors() == {errno.ENODEV: flying.ONCE_MORE}


def test_a_controller_that_is_reset(tmp_path: Path) -> None:
    """Reads in flight are delivered or fail with a reason; it works afterwards."""
    with in_flight("slow", tmp_path) as flight:
        reset = time.monotonic()
        (flight.drive.controller / "reset_controller").write_text("1")
        during, afterwards = flight.to_the_end()
    assert during.after(reset) >= MANY, "they weren't in flight"
    assert set(during.errors()) <= {errno.EINTR, errno.EIO}
    assert afterwards.errors() == {}


def test_a_fast_drive_that_is_reset_again_and_again(buffer: GpuMappedBuffer) -> None:
    """With a batch on its way each time, half of it done or all, and one without a reset after it.

    None is submitted during a reset: on Linux 6.12 the emulated drive then reports success, now and
    then, for commands that it never executed, and nobody can tell.
    """
    drive = VICTIMS["fast"]
    extents = guest.pieces(0, drive.blocks, 8)
    expected, size = drive.contents(extents), 8 * drive.block_size
    reset = partial((drive.controller / "reset_controller").write_text, "1")
    with Namespace(drive.generic) as namespace, AsyncUringStream(buffer, depth=256) as stream:
        commands = guest.packed(namespace, extents, buffer.address)
        for _ in range(5):
            for meanwhile in (reset, None):
                thread = threading.Thread(target=meanwhile)
                guest.fill(buffer, 0x42)
                tokens = stream.submit_nvme_passthrough(namespace, commands)
                thread.start()
                done = stream.wait(len(tokens), timeout=30)
                thread.join()
                assert sorted(completion.user_data for completion in done) == list(tokens)
                with buffer.view() as found:
                    for completion in done:
                        at = (completion.user_data - tokens[0]) * size
                        if completion.ok:
                            assert found[at : at + size] == expected[at : at + size]
                        else:
                            assert meanwhile is reset
                            assert error_of(completion) in (errno.EINTR, errno.EIO)


@pytest.mark.parametrize("register", [None, False])
def test_a_drive_that_is_rescanned_again_and_again(
    register: bool | None, buffer: GpuMappedBuffer
) -> None:
    """Its queue is frozen meanwhile: the kernel's worker threads send what is submitted then.

    This thread computes while they are made, so that the kernel makes them as it returns from an
    interrupt. These have been seen to fail with EFAULT whatever they are given, half of them here.
    """
    drive = VICTIMS["fast"]
    extents = guest.pieces(0, drive.blocks, 8)
    expected = drive.contents(extents)
    over = threading.Event()

    def rescan() -> None:
        while not over.is_set():
            (drive.controller / "rescan_controller").write_text("1")
            time.sleep(0.001)

    thread = threading.Thread(target=rescan)
    thread.start()
    try:
        with (
            Namespace(drive.generic) as namespace,
            AsyncUringStream(buffer, depth=256, register=register) as stream,
        ):
            commands = guest.packed(namespace, extents, buffer.address)
            for _ in range(20):
                guest.fill(buffer, 0x42)
                count = len(stream.submit_nvme_passthrough(namespace, commands))
                sum(range(200_000))
                done = stream.wait(count, timeout=30)
                assert [completion.result() for completion in done] == [8 * 512] * count
                guest.check(buffer, expected)
    finally:
        over.set()
        thread.join()


def error_of(completion: Completion) -> int:
    with pytest.raises(OSError, match="reading LBA") as caught:
        completion.result()
    return caught.value.errno or -1


def test_a_process_that_is_killed(tmp_path: Path, buffer: GpuMappedBuffer) -> None:
    """It is gone in seconds, its reads in flight or not, and the drive is as good as before."""
    with in_flight("slow", tmp_path) as flight:
        killed = time.monotonic()
        flight.process.kill()
        assert flight.process.wait(10) == -9
        assert time.monotonic() < killed + 5
        assert flight.output.read() == "", "nothing was in flight"
    drive = flight.drive
    extents = [(0, 8), (drive.blocks - 8, 8)]
    with Namespace(drive.generic) as namespace, AsyncUringStream(buffer) as stream:
        guest.read(stream, namespace, extents)
        guest.check(buffer, drive.contents(extents))


# ---- A namespace that shrinks


def test_a_drive_whose_place_a_smaller_one_takes(buffer: GpuMappedBuffer) -> None:
    """What knew the old one reads nothing of the new, and no block is read that the new hasn't."""
    drive = VICTIMS["fast"]
    half = drive.blocks // 2
    upper = guest.pieces(half - 8, 16, 8)
    with Namespace(drive.generic) as old, AsyncUringStream(buffer) as stream:
        guest.read(stream, old, upper)
        guest.check(buffer, drive.contents(upper))

        assert guest.answer_to("unplug fast") == "ok"
        guest.wait_until(lambda: not guest.is_there(drive), "the drive is gone")
        request = f"plug fast {half * drive.block_size}"
        guest.wait_until(lambda: guest.answer_to(request) == "ok", "the slot is empty")
        guest.wait_until(lambda: guest.is_there(drive), "the new drive is there")
        new = replace(drive, nsid=1, blocks=half)

        pattern = guest.fill(buffer, 0x99)
        stream.submit_nvme_passthrough(old, guest.packed(old, upper, buffer.address))
        for completion in stream.wait(2, timeout=10):
            with pytest.raises(OSError, match="No such device"):
                completion.result()
        guest.check(buffer, pattern)

        with Namespace(new.generic) as namespace:
            assert (namespace.capacity, namespace.nsid) == (half, 1)
            whole = guest.pieces(0, half, 64)
            guest.read(stream, namespace, whole)
            guest.check(buffer, drive.contents(whole))
            commands = guest.packed(namespace, upper, buffer.address)
            with pytest.raises(ValueError, match=f"^command 1: .*capacity .* {half} blocks"):
                stream.submit_nvme_passthrough(namespace, commands)
        check_beyond_the_end(stream, new, drive.blocks)


def check_beyond_the_end(stream: AsyncUringStream, drive: guest.Drive, blocks: int) -> None:
    """Believed to have its old size, the drive itself refuses what it hasn't, and no more."""
    believed = Geometry(drive.nsid, drive.block_size, blocks, 512 << 10)
    extents = guest.pieces(0, blocks, 8)
    assert 8 * len(extents) == 2 * drive.blocks
    pattern = guest.fill(stream.buffer, 0x66)
    with Namespace(drive.generic, geometry=believed) as namespace:
        commands = guest.packed(namespace, extents, stream.buffer.address)
        tokens = stream.submit_nvme_passthrough(namespace, commands)
        done = stream.wait(len(tokens), timeout=10)
    assert sorted(completion.user_data for completion in done) == list(tokens)
    delivered = extents[: len(extents) // 2]
    for completion in done:
        extent = extents[completion.user_data - tokens[0]]
        assert completion.ok == (extent in delivered)
        if not completion.ok:
            with pytest.raises(NvmeStatusError, match="LBA Out of Range") as caught:
                completion.result()
            assert (caught.value.starting_lba, caught.value.blocks) == extent
    expected = drive.contents(delivered)
    guest.check(stream.buffer, expected + pattern[len(expected) :])
