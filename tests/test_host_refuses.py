"""The host says no: limits, permissions, seccomp and sysctl, each set for real.

Each refusal is one exception, of the type that its errno has, whose text tells the cause, the value
that is in the way and the remedy; nothing is left behind; and with the remedy applied it works. The
functions that change their process run in one of their own (`in_child`), and those that change the
kernel in the lab.
"""

import ctypes
import errno
import gc
import os
import re
import resource
import struct
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import needs_lab, run_python

from gdsdirect import (
    AsyncUringStream,
    Evidence,
    Geometry,
    GpuMappedBuffer,
    Namespace,
    Status,
    encode_nvme_read_sqe,
    survey,
)

HERE = Path(__file__).resolve().parent
KIB, MIB = 1 << 10, 1 << 20
GEOMETRY = Geometry(nsid=3, lba_size=512, capacity=1000, max_transfer=64 << 10)
NOBODY = 65534

IO_URING_SETUP, IO_URING_ENTER, IO_URING_REGISTER = 425, 426, 427  # on every architecture
PROFILE = "allow io_uring_setup, io_uring_enter and io_uring_register in the container's profile"


def in_child(function: Callable[[], None]) -> None:
    """Run a function of this file in a process of its own; what it raises fails the test."""
    assert run_python(CHILD, str(HERE), function.__name__) == "done\n"


CHILD = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "import test_host_refuses as tests; tests.run(sys.argv[2])"
)


def run(name: str) -> None:
    with nothing_left():
        globals()[name]()
    print("done")


# ---- What a child does to itself


def become_ordinary() -> None:
    """Give up root, and with it CAP_SYS_ADMIN, CAP_IPC_LOCK and the right to open everything."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def set_soft_limit(which: int, soft: int) -> None:
    resource.setrlimit(which, (soft, resource.getrlimit(which)[1]))


def refuse_system_calls(number: int, *calls: int) -> None:
    """A seccomp filter: `calls` fail with the errno `number`."""
    load_call, jump_if_equal, give_back = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
    refused, allowed = 0x00050000 | number, 0x7FFF0000  # SECCOMP_RET_ERRNO, SECCOMP_RET_ALLOW
    program = [(load_call, 0, 0, 0)]
    for call in calls:
        program += [(jump_if_equal, 0, 1, call), (give_back, 0, 0, refused)]
    program.append((give_back, 0, 0, allowed))
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    text = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("@HP", len(program), ctypes.addressof(text))
    set_no_new_privileges, set_seccomp, mode_filter = 38, 22, 2
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    pointer = ctypes.create_string_buffer(header, len(header))
    assert prctl(set_no_new_privileges, 1, 0, 0, 0) == 0
    assert prctl(set_seccomp, mode_filter, ctypes.addressof(pointer), 0, 0) == 0


# ---- What is judged


def held() -> tuple[list[str], int, int]:
    """What a ring holds in this process: descriptors, mapped queues, and bytes of fork marks."""
    gc.collect()  # tracebacks hold what was in their frames
    queues = marks = size = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            queues += "io_uring" in line
        elif line.startswith("Size:"):
            size = int(line.split()[1])
        elif line.startswith("VmFlags:") and "wf" in line.split():  # MADV_WIPEONFORK
            marks += size
    return sorted(os.listdir("/proc/self/fd"), key=int), queues, marks


@contextmanager
def nothing_left() -> Iterator[None]:
    """What is held at the end is what was held at the beginning."""
    before = held()
    yield
    assert held() == before, f"{before} became {held()}"


@contextmanager
def refused(number: int, *words: str) -> Iterator[None]:
    """Exactly one exception: the OSError that `number` has, and all of `words` in its text."""
    with pytest.raises(OSError, match=re.escape(words[0])) as raised:
        yield
    error = raised.value
    assert type(error) is type(OSError(number, "")), repr(error)
    assert error.errno == number, repr(error)
    assert os.strerror(number) in str(error), error
    for word in words:
        assert word in str(error), f"{word!r} is not in {str(error)!r}"
    assert error.__cause__ is None, "another exception behind it"
    assert error.__context__ is None or error.__suppress_context__, "another exception behind it"


def use_ring(**options: bool) -> None:
    """Make a ring and read with it: what works once a remedy is applied."""
    with (
        GpuMappedBuffer.from_host_visible(4 * KIB) as buffer,
        Namespace("/dev/null", geometry=GEOMETRY) as namespace,
        AsyncUringStream(buffer, **options) as stream,
        open("/dev/zero", "rb") as file,
    ):
        stream.submit_nvme_passthrough(namespace, encode_nvme_read_sqe(3, 0, 1, buffer.address))
        stream.submit_read(file, 0, 100, 0)
        assert sorted(completion.result() for completion in stream.wait(2)) == [100, 512]


# ---- Limits


def memlock_too_small() -> None:
    become_ordinary()
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    set_soft_limit(resource.RLIMIT_MEMLOCK, MIB)
    words = "4194304 bytes", "RLIMIT_MEMLOCK, 1048576 bytes", "raise `ulimit -l`", "smaller buffer"
    buffer = GpuMappedBuffer.from_host_visible(4 * MIB)
    for _ in range(8):
        with refused(errno.ENOMEM, *words):
            AsyncUringStream(buffer, register=True)
    with AsyncUringStream(buffer) as stream, open("/dev/zero", "rb") as file:
        assert not stream.registered
        stream.submit_read(file, 0, 100, 0)
        assert stream.wait()[0].result() == 100
        with refused(errno.ENOMEM, *words):
            stream.submit_read_fixed(file, 0, 100, 0)
        assert (stream.inflight, stream.stats.submitted) == (0, 1)
    use_ring(register=True)  # a smaller buffer
    set_soft_limit(resource.RLIMIT_MEMLOCK, hard)
    with AsyncUringStream(buffer, register=True) as stream:
        assert stream.registered
    buffer.close()


def no_descriptor_for_a_ring() -> None:
    buffer = GpuMappedBuffer.from_host_visible(4 * KIB)
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    with nothing_left():
        for _ in range(8):
            set_soft_limit(resource.RLIMIT_NOFILE, 3)
            with refused(errno.EMFILE, "RLIMIT_NOFILE is 3", "close some", "raise `ulimit -n`"):
                AsyncUringStream(buffer)
            set_soft_limit(resource.RLIMIT_NOFILE, soft)
    with AsyncUringStream(buffer):
        pass
    buffer.close()


def no_descriptor_for_fileno() -> None:
    """With none left and with one left: fileno() needs two."""
    buffer = GpuMappedBuffer.from_host_visible(4 * KIB)
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    with AsyncUringStream(buffer) as stream, open("/dev/zero", "rb") as file:
        last = file.fileno()
        with nothing_left():
            for limit in (last + 1, last + 2):
                set_soft_limit(resource.RLIMIT_NOFILE, limit)
                words = f"RLIMIT_NOFILE is {limit}", "close some", "raise `ulimit -n`"
                with refused(errno.EMFILE, *words):
                    stream.fileno()
                set_soft_limit(resource.RLIMIT_NOFILE, soft)
        assert stream.fileno() > last
        stream.submit_read(file, 0, 100, 0)
        assert stream.wait()[0].result() == 100
    buffer.close()


def no_descriptor_for_a_read() -> None:
    """Each batch has its own, since the caller may close his at any moment."""
    buffer = GpuMappedBuffer.from_host_visible(4 * KIB)
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    offsets = array("Q", range(5))
    with AsyncUringStream(buffer, depth=4) as stream, open("/dev/zero", "rb") as file:
        limit = file.fileno() + 1
        with nothing_left():
            for submit in (stream.submit_reads, stream.submit_reads_fixed) * 4:
                set_soft_limit(resource.RLIMIT_NOFILE, limit)
                words = (
                    "/dev/zero",
                    f"RLIMIT_NOFILE is {limit}",
                    "close some",
                    "raise `ulimit -n`",
                )
                with refused(errno.EMFILE, *words):
                    submit(file, offsets, 100, offsets)
                assert (stream.inflight, stream.stats.submitted) == (0, 0)
                set_soft_limit(resource.RLIMIT_NOFILE, soft)
        stream.submit_reads(file, offsets[:4], 100, offsets[:4])
        assert [c.result() for c in stream.wait(4)] == [100] * 4
    buffer.close()


def no_descriptor_for_a_namespace() -> None:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    with nothing_left():
        set_soft_limit(resource.RLIMIT_NOFILE, 3)
        words = "/dev/null", "RLIMIT_NOFILE is 3", "close some", "raise `ulimit -n`"
        with refused(errno.EMFILE, *words):
            Namespace("/dev/null", geometry=GEOMETRY)
        set_soft_limit(resource.RLIMIT_NOFILE, soft)
        Namespace("/dev/null", geometry=GEOMETRY).close()


def deeper_than_memory() -> None:
    """No room for the queues of so deep a ring, and enough for a less deep one."""
    buffer = GpuMappedBuffer.from_host_visible(4 * KIB)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    set_soft_limit(resource.RLIMIT_AS, used + 4 * MIB)
    with nothing_left():
        for _ in range(8):
            with refused(errno.ENOMEM, "depth 32768", "RLIMIT_MEMLOCK is", "make it less deep"):
                AsyncUringStream(buffer, 32768)
        AsyncUringStream(buffer, 1024).close()
    buffer.close()


@pytest.mark.parametrize(
    "child",
    [
        memlock_too_small,
        no_descriptor_for_a_ring,
        no_descriptor_for_fileno,
        no_descriptor_for_a_read,
        no_descriptor_for_a_namespace,
        deeper_than_memory,
    ],
)
def test_limits(child: Callable[[], None]) -> None:
    in_child(child)


def test_a_ring_deeper_than_the_kernel_allows() -> None:
    with GpuMappedBuffer.from_host_visible(4 * KIB) as buffer, nothing_left():
        for depth in (32769, 2**31, 0):
            with pytest.raises(ValueError, match=rf"^depth is {depth}, outside 1\.\.32768$"):
                AsyncUringStream(buffer, depth)
        for depth in (1, 32768):
            AsyncUringStream(buffer, depth).close()


# ---- Seccomp


def seccomp_refuses_setup() -> None:
    refuse_system_calls(errno.EPERM, IO_URING_SETUP)
    with GpuMappedBuffer.from_host_visible(4 * KIB) as buffer, nothing_left():
        for _ in range(8):
            with refused(errno.EPERM, "seccomp", "Seccomp: 2 in /proc/self/status", PROFILE):
                AsyncUringStream(buffer)


def seccomp_hides_setup() -> None:
    refuse_system_calls(errno.ENOSYS, IO_URING_SETUP)
    release = f"Linux {os.uname().release}"
    with GpuMappedBuffer.from_host_visible(4 * KIB) as buffer, nothing_left():
        for _ in range(8):
            words = "seccomp", "Seccomp: 2 in /proc/self/status", release, "5.19 or later", PROFILE
            with refused(errno.ENOSYS, *words):
                AsyncUringStream(buffer)


def seccomp_refuses_registering() -> None:
    """Reads go on unregistered, which `registered` tells; who insists gets the error."""
    refuse_system_calls(errno.EPERM, IO_URING_REGISTER)
    words = "seccomp", "Seccomp: 2 in /proc/self/status", PROFILE, "use submit_read"
    use_ring()
    with GpuMappedBuffer.from_host_visible(4 * KIB) as buffer:
        for _ in range(8):
            with refused(errno.EPERM, *words):
                AsyncUringStream(buffer, register=True)
        with AsyncUringStream(buffer) as stream, open("/dev/zero", "rb") as file:
            assert not stream.registered
            with refused(errno.EPERM, *words):
                stream.submit_read_fixed(file, 0, 100, 0)


def seccomp_refuses_entering() -> None:
    """The ring is made, and takes nothing: each call says so, and close() works."""
    refuse_system_calls(errno.EPERM, IO_URING_ENTER)
    with (
        GpuMappedBuffer.from_host_visible(4 * KIB) as buffer,
        Namespace("/dev/null", geometry=GEOMETRY) as namespace,
        AsyncUringStream(buffer) as stream,
        open("/dev/zero", "rb") as file,
    ):
        command = encode_nvme_read_sqe(3, 0, 1, buffer.address)
        submissions: tuple[Callable[[], object], ...] = (
            lambda: stream.submit_read(file, 0, 100, 0),
            lambda: stream.submit_nvme_passthrough(namespace, command * 200),
        )
        for submit in submissions * 4:
            with refused(errno.EPERM, "in io_uring_enter: a seccomp filter", PROFILE):
                submit()
        assert (stream.inflight, stream.stats.submitted, stream.poll()) == (0, 0, [])


def survey_names_seccomp() -> None:
    survey(verify=False)
    refuse_system_calls(errno.EPERM, IO_URING_SETUP)
    found = survey(__file__)
    (check,) = (check for check in found.checks if check.name == "kernel.io_uring")
    assert (check.status, check.remedy) == (Status.MISSING, PROFILE)
    assert check.why.startswith("a seccomp filter refuses it")
    assert Evidence("/proc/self/status", "Seccomp:\t2") in check.evidence
    assert found.exit_code == 2
    assert {verdict.closed_by[0] for verdict in found.verdicts if verdict.remedy == PROFILE}


def survey_names_the_limit() -> None:
    survey(verify=False)
    set_soft_limit(resource.RLIMIT_MEMLOCK, 0)
    become_ordinary()
    found = survey(verify=False)
    checks = {check.name: check for check in found.checks}
    assert checks["kernel.memlock"].status is Status.WARN
    assert checks["kernel.io_uring"].status is Status.MISSING
    assert "RLIMIT_MEMLOCK" in checks["kernel.io_uring"].why
    assert checks["kernel.io_uring"].remedy == "ulimit -l unlimited"


def seccomp_allows_the_three() -> None:
    """The remedy: a profile that refuses something else."""
    unused = 1023
    refuse_system_calls(errno.EPERM, unused)
    use_ring(register=True)


@pytest.mark.parametrize(
    "child",
    [
        seccomp_refuses_setup,
        seccomp_hides_setup,
        seccomp_refuses_registering,
        seccomp_refuses_entering,
        seccomp_allows_the_three,
        survey_names_seccomp,
        survey_names_the_limit,
    ],
)
def test_seccomp(child: Callable[[], None]) -> None:
    in_child(child)


# ---- Permissions


def device_without_permission() -> None:
    become_ordinary()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ng0n1"
        path.touch(mode=0)
        owner = f"uid {os.getuid()} and gid {os.getgid()}"
        with nothing_left():
            for _ in range(8):
                words = str(path), "needs read permission", "mode 0000", owner, "join the group"
                with refused(errno.EACCES, *words):
                    Namespace(path, geometry=GEOMETRY)
        path.chmod(0o400)
        Namespace(path, geometry=GEOMETRY).close()


def test_a_device_without_permission() -> None:
    in_child(device_without_permission)


# ---- The kernel's own switches, in the lab

DISABLED = Path("/proc/sys/kernel/io_uring_disabled")
GROUP = Path("/proc/sys/kernel/io_uring_group")


@contextmanager
def ordinary_user(*groups: int) -> Iterator[bool]:
    """In a process of its own, as an ordinary user in `groups`: yields True there, False here."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgroups(groups)
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            yield True
            status = 0
        except BaseException as error:
            print(repr(error), flush=True)
        finally:
            os._exit(status)
    yield False
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def may_not(*words: str) -> None:
    with GpuMappedBuffer.from_host_visible(4 * KIB) as buffer, nothing_left():
        for _ in range(4):
            with refused(errno.EPERM, *words):
                AsyncUringStream(buffer)


def switches_in_the_guest() -> None:
    """Runs in the guest, as root."""
    group = 4711
    DISABLED.write_text("1")
    GROUP.write_text(f"{group}")
    use_ring()
    with ordinary_user() as inside:
        if inside:
            words = "kernel.io_uring_disabled is 1", f"kernel.io_uring_group ({group})", "join it"
            may_not(*words, "CAP_SYS_ADMIN", "`sysctl kernel.io_uring_disabled=0`")
    with ordinary_user(group) as inside:
        if inside:
            use_ring()  # it joined

    DISABLED.write_text("2")
    nobody = "kernel.io_uring_disabled is 2", "run `sysctl kernel.io_uring_disabled=0`"
    may_not(*nobody)
    with ordinary_user(group) as inside:
        if inside:
            may_not(*nobody)

    DISABLED.write_text("0")  # what sysctl does
    use_ring()
    with ordinary_user() as inside:
        if inside:
            use_ring()


def device_in_the_guest() -> None:
    """Runs in the guest, as root: a true drive, whose node has a mode of its own."""
    node = Path("/dev/ng0n1")
    for mode, allowed in ((0o600, False), (0o666, True)):
        node.chmod(mode)
        with ordinary_user() as inside:
            if inside and allowed:
                Namespace(node).close()
            elif inside:
                with nothing_left(), refused(errno.EACCES, str(node), "mode 0600", "uid 0"):
                    Namespace(node)


@pytest.mark.lab
@needs_lab()
@pytest.mark.parametrize("child", [switches_in_the_guest, device_in_the_guest])
def test_in_a_kernel_of_its_own(child: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    import lab

    monkeypatch.chdir(HERE)
    result = lab.run(
        [sys.executable, "-P", "-W", "error", "-c", CHILD, str(HERE), child.__name__],
        kernel="6.12",
        drives=[lab.Drive()],
        timeout=120,
    )
    print(result.output)
    assert (result.status, result.output) == (0, "done\n")
    assert result.kernel_problems == ()
