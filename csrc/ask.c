/*
 * What the kernel can do, asked of it by doing it in small: versions do not tell, since distributions
 * carry features back, and sysctl, seccomp and security modules take them away. And what a controller
 * says of itself.
 */
#include "module.h"

#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "dioalign.h"
#include "nvme_abi.h"

#define PAGE 4096

/* Each answer is 0 or an errno. */
struct answers {
    int setup;             /* io_uring_setup, without any flag */
    int enter;             /* io_uring_enter: a no-op comes back */
    int registers;         /* IORING_REGISTER_BUFFERS, one page */
    int big_entries;       /* SQE128 and CQE32, which every ring of ours has */
    int passthrough;       /* IORING_OP_URING_CMD in them */
    int passthrough_fixed; /* the same, into a registered buffer */
    int single_thread;     /* what these three of AsyncUringStream's options ask for */
    int sqpoll;
    int iopoll;
};

/* A ring with these flags can be set up. The smallest there is. */
static int
ask_setup(struct io_uring *ring, unsigned flags)
{
    struct io_uring_params params = {.flags = flags, .sq_thread_idle = 1};
    return -io_uring_queue_init_params(1, ring, &params);
}

static int
ask_flags(unsigned flags)
{
    struct io_uring ring;
    int failed = ask_setup(&ring, flags | IORING_SETUP_SQE128 | IORING_SETUP_CQE32);
    if (failed == 0) {
        io_uring_queue_exit(&ring);
    }
    return failed;
}

/* Sends a command of this kind, with `flags` into the registered page. */
static int
ask_entry(struct io_uring *ring, int opcode, int fd, void *page, unsigned flags)
{
    struct io_uring_cqe *cqe;
    struct io_uring_sqe *sqe = io_uring_get_sqe(ring);
    if (sqe == NULL) {
        return EAGAIN;
    }
    memset(sqe, 0, ring->flags & IORING_SETUP_SQE128 ? 2 * sizeof(*sqe) : sizeof(*sqe));
    sqe->opcode = (uint8_t)opcode;
    sqe->fd = fd;
    sqe->rw_flags = (int)flags; /* uring_cmd_flags, which older headers don't name */
    sqe->addr = flags ? (uintptr_t)page : 0;
    sqe->len = flags ? PAGE : 0;
    int result = io_uring_submit_and_wait(ring, 1);
    if (result >= 0 && (result = io_uring_wait_cqe(ring, &cqe)) == 0) {
        result = cqe->res;
        io_uring_cqe_seen(ring, cqe);
    }
    return result < 0 ? -result : 0;
}

/* /dev/null takes any passthrough command, and does nothing. */
static void
ask_commands(struct answers *answers, void *page)
{
    struct io_uring ring;
    struct iovec one = {.iov_base = page, .iov_len = PAGE};
    answers->big_entries = ask_setup(&ring, IORING_SETUP_SQE128 | IORING_SETUP_CQE32);
    if (answers->big_entries != 0) {
        answers->passthrough = answers->passthrough_fixed = answers->big_entries;
        return;
    }
    int fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    answers->passthrough = fd < 0 ? errno : ask_entry(&ring, IORING_OP_URING_CMD, fd, page, 0);
    answers->passthrough_fixed = answers->passthrough;
    if (answers->passthrough == 0) {
        answers->passthrough_fixed = -io_uring_register_buffers(&ring, &one, 1);
    }
    if (answers->passthrough_fixed == 0) {
        answers->passthrough_fixed =
            ask_entry(&ring, IORING_OP_URING_CMD, fd, page, IORING_URING_CMD_FIXED);
    }
    if (fd >= 0) {
        close(fd);
    }
    io_uring_queue_exit(&ring);
}

static void
ask_all(struct answers *answers, void *page)
{
    struct io_uring ring;
    struct iovec one = {.iov_base = page, .iov_len = PAGE};
    answers->setup = ask_setup(&ring, 0);
    if (answers->setup == 0) {
        answers->enter = ask_entry(&ring, IORING_OP_NOP, -1, page, 0);
        answers->registers = -io_uring_register_buffers(&ring, &one, 1);
        io_uring_queue_exit(&ring);
    }
    else {
        answers->enter = answers->registers = answers->setup;
    }
    ask_commands(answers, page);
    answers->single_thread = ask_flags(IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN |
                                       IORING_SETUP_TASKRUN_FLAG);
    answers->sqpoll = ask_flags(IORING_SETUP_SQPOLL);
    answers->iopoll = ask_flags(IORING_SETUP_IOPOLL);
}

/* ask_io_uring() -> dict: each of struct answers by its name. */
PyObject *
gdsdirect_ask_io_uring(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    struct answers answers = {0};
    void *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED) {
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    Py_BEGIN_ALLOW_THREADS
    ask_all(&answers, page);
    munmap(page, PAGE);
    Py_END_ALLOW_THREADS
    return Py_BuildValue("{sisisisisisisisisi}", "setup", answers.setup, "enter", answers.enter,
                         "registers", answers.registers, "big_entries", answers.big_entries,
                         "passthrough", answers.passthrough, "passthrough_fixed",
                         answers.passthrough_fixed, "single_thread", answers.single_thread,
                         "sqpoll", answers.sqpoll, "iopoll", answers.iopoll);
}

/* direct_alignment(fd) -> (memory, offset) in bytes, what O_DIRECT wants of a file: STATX_DIOALIGN of
 * statx(2), Linux 6.1. (0, 0): its file system takes none. None where the kernel doesn't tell. */
PyObject *
gdsdirect_direct_alignment(PyObject *Py_UNUSED(module), PyObject *args)
{
    int fd, result;
    struct statx info;
    if (!PyArg_ParseTuple(args, "i:direct_alignment", &fd)) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    result = statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &info);
    Py_END_ALLOW_THREADS
    if (result < 0) {
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    if (!(info.stx_mask & STATX_DIOALIGN)) {
        Py_RETURN_NONE;
    }
    const struct dioalign found = dioalign_of(&info);
    return Py_BuildValue("(II)", found.memory, found.offset);
}

/* nvme_identify(fd, cns, nsid) -> bytes: the Identify command's 4096-byte data structure. */
PyObject *
gdsdirect_nvme_identify(PyObject *Py_UNUSED(module), PyObject *args)
{
    int fd, result;
    unsigned int cns, nsid;
    if (!PyArg_ParseTuple(args, "iII:nvme_identify", &fd, &cns, &nsid)) {
        return NULL;
    }
    PyObject *data = PyBytes_FromStringAndSize(NULL, 4096);
    if (data == NULL) {
        return NULL;
    }
    struct nvme_kernel_cmd cmd = {
        .opcode = NVME_ADMIN_IDENTIFY,
        .nsid = nsid,
        .addr = (uintptr_t)PyBytes_AS_STRING(data),
        .data_len = 4096,
        .cdw10 = cns,
    };
    Py_BEGIN_ALLOW_THREADS
    result = ioctl(fd, NVME_IOCTL_ADMIN_CMD, &cmd);
    Py_END_ALLOW_THREADS
    if (result == 0) {
        return data;
    }
    Py_DECREF(data);
    if (result > 0) {
        /* Positive: the controller's status word, not an errno. */
        PyObject *text = PyUnicode_FromFormat("Identify (CNS %u): NVMe status 0x%x", cns, result);
        PyObject *values = text ? Py_BuildValue("(iN)", EIO, text) : NULL;
        if (values != NULL) {
            PyErr_SetObject(PyExc_OSError, values);
            Py_DECREF(values);
        }
        return NULL;
    }
    return PyErr_SetFromErrno(PyExc_OSError);
}
