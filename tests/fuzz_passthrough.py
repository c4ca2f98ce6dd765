"""A fuzzer of the decoder and of submit_nvme_passthrough, on /dev/null.

    python -P tests/fuzz_passthrough.py --seconds 60
    python -P tests/fuzz_passthrough.py --seconds 60 --coverage

Commands are random bytes, good commands with bits, bytes or fields changed, and values at and
around each bound, in batches of any size. The rules that a command must keep are written down here
a second time, in NumPy (`Setting.broken_rules`); the package and they must agree on every command:
a batch without a bad one is taken and completes as asked, one with a bad one is refused whole, by
an error that names the first bad one and a rule that it breaks. A disagreement is printed with the
bytes that show it, and the exit status is 1.

With --coverage libFuzzer (the package atheris) chooses the bytes, by the branches that they reach
in the extensions. These must be built for it, by clang with -fsanitize=fuzzer-no-link, and run with
LD_PRELOAD=asan_with_fuzzer.so, which is in the folder that atheris.path() tells.
"""

import argparse
import contextlib
import os
import random
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gdsdirect import (
    COMPLETION_FORMAT,
    AsyncUringStream,
    Geometry,
    GpuMappedBuffer,
    Namespace,
    decode_nvme_read_sqe,
)
from gdsdirect._nvme_sqe import _kernel_command

WIRE = np.dtype(
    {
        "names": ["opcode", "nsid", "address", "lba", "last"],
        "formats": ["u1", "<u4", "<u8", "<u8", "<u4"],
        "offsets": [0, 4, 32, 40, 48],
        "itemsize": 64,
    }
)
# What libFuzzer writes for a command: relative to the setting, whose numbers it could not guess.
RECIPE = np.dtype(
    [
        *(("nsid", "<u4"), ("offset", "<u8"), ("lba", "<u8"), ("last", "<u4")),
        *(("place", "u1"), ("change", "u1")),
    ]
)
RECORD = np.dtype([("user_data", "<u8"), ("res", "<i4"), ("nbytes", "<u4")])
assert struct.calcsize(COMPLETION_FORMAT) == RECORD.itemsize

Commands = NDArray[np.void]  # of WIRE
Mask = NDArray[np.bool_]

ROUND = 1 << 14
MOST_IN_A_BATCH = 700

# A rule, and how the error for breaking it begins behind "command N: ".
RULES = {
    "opcode": "opcode (byte 0) is not NVME_CMD_READ, 0x02",
    "reserved": "reserved bytes (1..3, 8..31 and 52..63) are not all 0",
    "count": "blocks - 1 (bytes 48..51) is above 65535",
    "nsid": "namespace_id is {nsid}, and /dev/null has ",
    "capacity": "starting_lba {lba} and {blocks} blocks end beyond the capacity of /dev/null, ",
    "length": "blocks is {blocks}, {nbytes} bytes, and /dev/null transfers at most ",
    "alignment": "dest_bar1_ptr {address:#x} is not a multiple of 4",
    "destination": "dest_bar1_ptr {address:#x} and {nbytes} bytes lie outside the stream's buffer",
}
OF_THE_FORMAT = ("opcode", "reserved", "count")


class Disagreement(Exception):
    """The package did other than the rules say."""


def as_bytes(commands: Commands) -> NDArray[np.uint8]:
    return commands.view(np.uint8).reshape(-1, 64)


@dataclass(frozen=True)
class Setting:
    """A namespace and a stream with a buffer, and the rules that follow from them."""

    namespace: Namespace
    stream: AsyncUringStream

    def broken_rules(self, commands: Commands) -> dict[str, Mask]:
        """Which commands break which rule."""
        one = np.uint64(1)
        geometry = self.namespace.geometry
        octets = as_bytes(commands)
        unused = np.ones(64, dtype=bool)
        unused[[0, *range(4, 8), *range(32, 52)]] = False
        blocks = commands["last"].astype(np.uint64) + one
        nbytes = blocks * np.uint64(geometry.lba_size)
        address, lba = commands["address"], commands["lba"]
        low = np.uint64(self.stream.buffer.address)
        end = np.uint64(self.stream.buffer.address + self.stream.buffer.nbytes)
        last_lba = lba + (blocks - one)
        return {
            "opcode": octets[:, 0] != 2,
            "reserved": octets[:, unused].any(axis=1),
            "count": blocks > 65536,
            "nsid": commands["nsid"] != geometry.nsid,
            "capacity": (last_lba < lba) | (last_lba >= np.uint64(geometry.capacity)),
            "length": nbytes > geometry.max_transfer,
            "alignment": address % np.uint64(4) != 0,
            "destination": (address < low)
            | (address >= end)
            | (nbytes > end - np.clip(address, low, end)),
        }


@contextlib.contextmanager
def settings() -> Iterator[list[Setting]]:
    """Small and large bounds, buffers at odd addresses, rings deeper and less deep than a batch."""
    geometries = (
        (Geometry(3, 512, 1000, 64 << 10), 64),
        (Geometry(0xFFFFFFFE, 4096, 2**64 - 1, 0xFFFFF000), 1),
        (Geometry(1, 512, 1, 512), 7),
        (Geometry(0x01020304, 512, 2**32 + 5, 65536 * 512), 256),
        (Geometry(2, 1 << 31, 1 << 20, 1 << 31), 2),
    )
    with contextlib.ExitStack() as stack:
        made = []
        memory = bytearray(1 << 20)
        views = (memory, memoryview(memory)[1:], memoryview(memory)[: 3 * 512 + 4])
        buffers: list[GpuMappedBuffer] = []
        for view in views:
            buffers.append(stack.enter_context(GpuMappedBuffer.from_object(view)))
        # Not touched by /dev/null: as large as the largest command.
        large = np.empty(65536 * 512 + 8, dtype=np.uint8)
        buffers.append(stack.enter_context(GpuMappedBuffer.from_object(large)))
        for number, (geometry, depth) in enumerate(geometries):
            namespace = stack.enter_context(Namespace("/dev/null", geometry=geometry))
            for buffer in (buffers[number % 3], buffers[3]):
                stream = AsyncUringStream(buffer, depth, register=False)
                made.append(Setting(namespace, stack.enter_context(stream)))
        yield made


# ---- Judging


@dataclass
class Tally:
    """What was tried. Each command counts once, in `accepted`, `beside` or `refused`."""

    accepted: int = 0
    beside: int = 0
    """Good, and refused with a bad one behind it in the batch."""
    refused: Counter[str] = field(default_factory=Counter)
    """By the rule that the error named."""
    calls: int = 0

    @property
    def commands(self) -> int:
        return self.accepted + self.beside + self.refused.total()

    def __str__(self) -> str:
        reasons = ", ".join(f"{rule} {self.refused[rule]:,}" for rule in RULES)
        return (
            f"{self.commands:,} commands in {self.calls:,} batches: {self.accepted:,} accepted, "
            f"{self.refused.total():,} refused ({reasons}), {self.beside:,} refused with their "
            "batch"
        )


def names(bits: int) -> list[str]:
    """The rules whose bits are set."""
    return [rule for number, rule in enumerate(RULES) if bits >> number & 1]


def named_rule(error: ValueError, index: int, broken: int, values: dict[str, int]) -> str:
    """The rule that the error names; it must be one of those that the first bad command breaks."""
    text = str(error)
    prefix = f"command {index}: "
    for rule in names(broken):
        if text.startswith(prefix + RULES[rule].format_map(values)):
            return rule
    raise Disagreement(f"expected an error on command {index} for {names(broken)}, got {text!r}")


def check_decoder(commands: Commands, broken: dict[str, Mask]) -> None:
    """The decoder refuses what breaks a rule of the format, and reads everything else right."""
    bad = np.logical_or.reduce([broken[rule] for rule in OF_THE_FORMAT]).tolist()
    fields = zip(
        commands["nsid"].tolist(),
        commands["lba"].tolist(),
        (commands["last"].astype(np.uint64) + np.uint64(1)).tolist(),
        commands["address"].tolist(),
        strict=True,
    )
    wire = commands.tobytes()
    for number, (is_bad, expected) in enumerate(zip(bad, fields, strict=True)):
        try:
            decoded = decode_nvme_read_sqe(wire[64 * number : 64 * number + 64])
        except ValueError as error:
            if not is_bad:
                raise Disagreement(f"the decoder refuses command {number}: {error}") from None
        else:
            if is_bad or decoded != expected:
                raise Disagreement(f"the decoder takes command {number} as {decoded}")


def check_completions(setting: Setting, commands: Commands, tokens: range) -> None:
    """Every command came back once, in full."""
    out = np.zeros(len(commands), dtype=RECORD)
    got = setting.stream.wait_into(out, len(commands)) if len(commands) else 0
    blocks = commands["last"].astype(np.uint64) + np.uint64(1)
    if (
        got != len(commands)
        or len(tokens) != len(commands)
        or not np.array_equal(np.sort(out["user_data"]), np.arange(tokens.start, tokens.stop))
        or out["res"].any()
        or not np.array_equal(
            out["nbytes"][np.argsort(out["user_data"])],
            (blocks * np.uint64(setting.namespace.lba_size)).astype(np.uint32),
        )
    ):
        raise Disagreement(f"{len(commands)} good commands came back as {out[:got].tolist()}")


def check_kernel_form(setting: Setting, command: bytes) -> None:
    """What is sent for an accepted command: the read that it asks for, and nothing else."""
    nsid, address, lba, last = struct.unpack("<4xI24xQQI12x", command)
    lba_size = setting.namespace.lba_size
    low, high = lba & 0xFFFFFFFF, lba >> 32
    expected = struct.pack(
        "<BBHIIIQQIIIIIIIIII",
        *(2, 0, 0, nsid, 0, 0, 0, address, 0, (last + 1) * lba_size),
        *(low, high, last, 0, 0, 0, 0, 0),
    )
    if _kernel_command(command, lba_size) != expected:
        raise Disagreement(f"not the kernel's form of {command.hex()}")


def judge(setting: Setting, commands: Commands, sizes: Callable[[], int], tally: Tally) -> None:
    """Submit all commands in batches of `sizes()`, each once; the rest of a refused batch again."""
    broken = setting.broken_rules(commands)
    check_decoder(commands, broken)
    packed = np.zeros(len(commands), dtype=np.int64)
    for number, rule in enumerate(RULES):
        packed |= broken[rule].astype(np.int64) << number
    bad, bits = packed != 0, packed.tolist()
    # For each command the next bad one, itself included.
    where = np.where(bad, np.arange(len(commands)), len(commands))
    next_bad = np.minimum.accumulate(where[::-1])[::-1].tolist()

    def values(number: int) -> dict[str, int]:
        command = dict(zip(WIRE.names or (), commands[number].item(), strict=True))
        command["blocks"] = command["last"] + 1
        command["nbytes"] = command["blocks"] * namespace.lba_size
        return command

    stream, namespace = setting.stream, setting.namespace
    before = stream.stats.submitted
    accepted = at = 0
    wire = memoryview(commands.tobytes())
    while at < len(commands):
        end = min(at + sizes(), len(commands))
        first_bad = next_bad[at] if at < end else end
        tally.calls += 1
        try:
            tokens = stream.submit_nvme_passthrough(namespace, wire[64 * at : 64 * end])
        except ValueError as error:
            if first_bad >= end:
                raise Disagreement(f"good commands {at}..{end - 1} refused: {error}") from None
            tally.refused[
                named_rule(error, first_bad - at, bits[first_bad], values(first_bad))
            ] += 1
            tally.beside += first_bad - at
            if stream.inflight:
                raise Disagreement(f"part of a refused batch is in flight ({error})") from None
            at = first_bad + 1
        else:
            if first_bad < end:
                breaks = names(bits[first_bad])
                raise Disagreement(f"command {first_bad} was accepted, and breaks {breaks}")
            check_completions(setting, commands[at:end], tokens)
            check_kernel_form(setting, bytes(wire[64 * at : 64 * at + 64]))
            accepted += end - at
            at = end
    tally.accepted += accepted
    if (stream.stats.submitted - before, stream.stats.failed, stream.inflight) != (accepted, 0, 0):
        raise Disagreement(f"{accepted} commands were accepted; {stream.stats}")


def check_odd_length(setting: Setting, noise: bytes) -> None:
    """No multiple of 64 bytes: refused whatever the bytes, by both."""
    refusals = 0
    for call in (
        lambda: setting.stream.submit_nvme_passthrough(setting.namespace, noise),
        lambda: decode_nvme_read_sqe(noise),
    ):
        try:
            call()
        except ValueError:
            refusals += 1
    if refusals != 2 or setting.stream.inflight:
        raise Disagreement(f"{len(noise)} bytes were accepted")


# ---- Making commands


def good_commands(setting: Setting, count: int, rng: np.random.Generator) -> Commands:
    """Commands that keep all rules, where the setting allows any."""
    geometry, buffer = setting.namespace.geometry, setting.stream.buffer
    first = -buffer.address % 4
    room = buffer.nbytes - first
    most = min(geometry.max_transfer, room) // geometry.lba_size
    most = max(min(most, geometry.capacity, 65536), 1)
    blocks = 1 + np.minimum(rng.integers(0, most, count), rng.integers(0, most, count))
    nbytes = blocks * geometry.lba_size
    slack = np.maximum(room - nbytes, 0) // 4
    commands = np.zeros(count, dtype=WIRE)
    commands["opcode"] = 2
    commands["nsid"] = geometry.nsid
    commands["last"] = blocks - 1
    commands["address"] = np.uint64(buffer.address + first) + (
        rng.integers(0, slack, endpoint=True) * 4
    ).astype(np.uint64)
    room_for_lba = np.uint64(geometry.capacity) - blocks.astype(np.uint64)
    commands["lba"] = rng.integers(0, room_for_lba, dtype=np.uint64, endpoint=True)
    return commands


def bounds(setting: Setting) -> dict[str, list[int]]:
    """Values of each field at and around what the rules, and the fields' widths, draw as lines."""
    geometry, buffer = setting.namespace.geometry, setting.stream.buffer
    end = buffer.address + buffer.nbytes
    blocks = geometry.max_transfer // geometry.lba_size
    lines = {
        "opcode": [0, 1, 2, 3, 0x81, 0xFF],
        "nsid": [0, geometry.nsid, geometry.nsid << 8, 2**32 - 1, 2**31],
        "address": [0, buffer.address, end, end - geometry.lba_size, 2**63, 2**64 - 1],
        "lba": [0, geometry.capacity, geometry.capacity - blocks, 2**32, 2**63, 2**64 - 1],
        "last": [0, blocks, buffer.nbytes // geometry.lba_size, 65535, 2**31, 2**32 - 1],
    }
    near = (-4, -2, -1, 0, 0, 1, 2, 4)
    return {
        name: [(line + step) % (1 << 8 * WIRE[name].itemsize) for line in values for step in near]
        for name, values in lines.items()
    }


def spoil(setting: Setting, commands: Commands, rng: np.random.Generator) -> None:
    """Change a part of the commands, each in one way or several."""
    count = len(commands)
    octets = as_bytes(commands)

    def some(share: float) -> NDArray[np.intp]:
        return np.flatnonzero(rng.random(count) < share)

    for name, values in bounds(setting).items():
        chosen = some(0.08)
        commands[name][chosen] = rng.choice(np.array(values, dtype=WIRE[name]), len(chosen))
    chosen = some(0.1)  # one bit
    octets[chosen, rng.integers(0, 64, len(chosen))] ^= np.uint8(1) << rng.integers(
        0, 8, len(chosen), dtype=np.uint8
    )
    chosen = some(0.05)  # one byte
    octets[chosen, rng.integers(0, 64, len(chosen))] = rng.integers(
        0, 256, len(chosen), dtype=np.uint8
    )
    chosen = some(0.02)  # a field turned round, as if it were big-endian
    octets[chosen, 40:48] = octets[chosen, 40:48][:, ::-1]
    chosen = some(0.02)  # shifted by a byte
    octets[chosen] = np.roll(octets[chosen], 1, axis=1)
    chosen = some(0.02)  # a word of another command's at another place
    source, target = 8 * rng.integers(0, 8, 2)
    octets[chosen, target : target + 8] = octets[rng.permutation(chosen), source : source + 8]
    chosen = some(0.03)  # noise
    octets[chosen] = rng.integers(0, 256, (len(chosen), 64), dtype=np.uint8)


def fuzz(seconds: float, seed: int, tally: Tally) -> None:
    """Judge mutated commands for so long."""
    rng, sizes = np.random.default_rng(seed), random.Random(seed)
    until = time.monotonic() + seconds
    with settings() as made:
        while time.monotonic() < until:
            setting = sizes.choice(made)
            commands = good_commands(setting, ROUND, rng)
            spoil(setting, commands, rng)
            most = sizes.choice((1, 8, 64, MOST_IN_A_BATCH))
            try:
                judge(setting, commands, lambda most=most: sizes.randint(1, most), tally)
            except Disagreement as found:
                raise reproducer(setting, commands, found) from None
            noise = sizes.randbytes(64 * sizes.randrange(4) + sizes.randrange(1, 64))
            check_odd_length(setting, noise)


def reproducer(setting: Setting, commands: Commands, found: Disagreement) -> Disagreement:
    """The same, with the least that shows it: one command, if one does."""
    shown = commands.tobytes().hex()
    for number in range(len(commands)):
        try:
            judge(setting, commands[number : number + 1], lambda: 1, Tally())
        except Disagreement as alone:
            found, shown = alone, commands[number].tobytes().hex()
            break
    buffer = setting.stream.buffer
    return Disagreement(
        f"{found}\n  {setting.namespace.geometry}\n  buffer of {buffer.nbytes} bytes at "
        f"{buffer.address:#x}, depth {setting.stream.depth}\n  commands {shown}"
    )


# ---- By coverage


def cooked(setting: Setting, data: bytes) -> Commands:
    """The commands that libFuzzer's bytes stand for: as many RECIPEs as they hold.

    All zero is a good command; what shifts or repeats the bytes still gives commands that reach
    the later rules.
    """
    recipes = np.frombuffer(data, RECIPE, len(data) // RECIPE.itemsize)
    commands = np.zeros(len(recipes), dtype=WIRE)
    commands["opcode"] = 2
    commands["nsid"] = recipes["nsid"] ^ np.uint32(setting.namespace.nsid)
    commands["address"] = recipes["offset"] + np.uint64(setting.stream.buffer.address)
    commands["lba"] = recipes["lba"]
    commands["last"] = recipes["last"]
    as_bytes(commands)[np.arange(len(commands)), recipes["place"] % 64] ^= recipes["change"]
    return commands


def fuzz_by_coverage(seconds: float, seed: int) -> None:
    """Let libFuzzer choose. Does not return: libFuzzer ends the process."""
    import atheris

    tally = Tally()
    told = time.monotonic()

    def one(data: bytes) -> None:
        nonlocal told
        if time.monotonic() > told + 2:  # libFuzzer ends the process without a last word
            told = time.monotonic()
            print(f"so far {tally}", flush=True)
        if not data:
            return
        setting = made[data[0] % len(made)]
        if len(data) % 64:
            check_odd_length(setting, data)
        commands = cooked(setting, data[1:])
        try:
            judge(setting, commands, lambda: len(commands), tally)
        except Disagreement as found:
            raise reproducer(setting, commands, found) from None

    with settings() as made, tempfile.TemporaryDirectory() as corpus:
        for number in range(len(made)):
            for count in (1, 4, 16, 64):
                content = bytes([number]) + bytes(count * RECIPE.itemsize)
                (Path(corpus) / f"{number}-{count}").write_bytes(content)
        options = [f"-max_total_time={seconds:.0f}", f"-seed={seed}", "-len_control=0"]
        options += [f"-max_len={1 + 64 * RECIPE.itemsize}", "-use_value_profile=1"]
        atheris.Setup([sys.argv[0], *options, corpus], one)
        atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=os.environ.get("FUZZ_SECONDS", "60"))
    parser.add_argument("--seed", type=int, default=None, help="of the random numbers")
    parser.add_argument("--coverage", action="store_true", help="let libFuzzer choose the bytes")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.randrange(1, 2**31)
    print(f"seed {seed}", flush=True)
    if options.coverage:
        fuzz_by_coverage(options.seconds, seed)
    tally = Tally()
    start = time.monotonic()
    try:
        fuzz(options.seconds, seed, tally)
    except Disagreement as found:
        print(f"{tally}\nDISAGREEMENT: {found}")
        return 1
    print(f"{tally}; {time.monotonic() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
