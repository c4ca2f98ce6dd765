"""A process with 256 reads in flight, and a thread that waits for them. test_faults.py starts it.

    python flying.py NAMESPACE REPORT

It prints a line when the first of its reads is done. When it has all of them it prints another, and
waits for one on its standard input, reads some of the same once more, and ends. What the reads
brought is written to REPORT, one JSON object for each round.
"""

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

from gdsdirect import (
    AsyncUringStream,
    Completion,
    GpuMappedBuffer,
    Namespace,
    encode_nvme_read_sqe,
)

COUNT = 256
BLOCKS = 8
ONCE_MORE = 16
SECONDS = 30
"""Nothing takes as long."""

Done = tuple[float, Completion]
"""When a read was done, on CLOCK_MONOTONIC, which is every process's."""


def main(path: str, report: Path) -> None:
    with Namespace(path) as namespace, report.open("w") as lines:
        nbytes = BLOCKS * namespace.lba_size
        with (
            GpuMappedBuffer.from_host_visible(COUNT * nbytes) as buffer,
            AsyncUringStream(buffer, depth=COUNT) as stream,
        ):
            commands = b"".join(
                encode_nvme_read_sqe(namespace.nsid, lba, BLOCKS, buffer.address + i * nbytes)
                for i, lba in enumerate(range(0, COUNT * BLOCKS, BLOCKS))
            )
            for count in (COUNT, ONCE_MORE):
                buffer.view()[:] = b"\xe7" * buffer.nbytes
                tokens = stream.submit_nvme_passthrough(namespace, commands[: 64 * count])
                done = taken_by_a_thread(stream)
                print(json.dumps(told(tokens, done, stream)), file=lines)
                print("all came back", flush=True)
                sys.stdin.readline()


def taken_by_a_thread(stream: AsyncUringStream) -> list[Done]:
    """All that is in flight, waited for by a thread."""
    done: list[Done] = []
    first = threading.Event()

    def take() -> None:
        while completions := stream.wait():
            done.extend((time.monotonic(), completion) for completion in completions)
            first.set()

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    assert first.wait(SECONDS), "none came back"
    print("the first came back", flush=True)
    thread.join(SECONDS)
    assert not thread.is_alive(), f"{len(done)} came back"
    return done


def told(tokens: range, done: list[Done], stream: AsyncUringStream) -> dict[str, Any]:
    """What test_faults.py judges: the fields of its Round."""
    return {
        "tokens": list(tokens),
        "reads": [(when, *outcome(completion)) for when, completion in done],
        "contents": stream.buffer.view().hex(),
        "inflight": stream.inflight,
        "failed": stream.stats.failed,
    }


def outcome(completion: Completion) -> tuple[int, int, int, str]:
    """Its token, the bytes that it says are there, errno or 0, and the error's text."""
    try:
        nbytes = completion.result()
    except OSError as error:
        return completion.user_data, completion.nbytes, error.errno or -1, str(error)
    return completion.user_data, nbytes, 0, ""


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
