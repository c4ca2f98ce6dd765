/*
 * Commands in: checked, rewritten into the kernel's form, sent.
 */
#include "ring.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

#include "nvme_abi.h"

#define SQE_BYTES 128
#define SQE_COMMAND_OFFSET 48 /* struct io_uring_sqe, cmd[]: 80 bytes with IORING_SETUP_SQE128 */
#define REGISTERED_SHIFT 30   /* a registered buffer has at most 1 GiB (io_uring/rsrc.c) */
#define MOST_BYTES 0x7FFFF000u /* of one read: MAX_RW_COUNT, include/linux/fs.h */

_Static_assert(sizeof(struct nvme_kernel_cmd) <= SQE_BYTES - SQE_COMMAND_OFFSET, "fits the SQE");
_Static_assert(offsetof(struct io_uring_sqe, cmd) == SQE_COMMAND_OFFSET, "cmd");
_Static_assert(IORING_OP_READ_FIXED == 4, "22 is IORING_OP_READ, which ignores buf_index");

/* A checked command. Copied out of the caller's memory, which other threads may change between the
 * check and the last command's turn. */
struct command {
    uint64_t position;
    uint64_t address;
    uint32_t nbytes;
    uint16_t registered; /* the registered buffer that it falls into, or NOT_REGISTERED */
};

/* Commands of one call: one source, one way. */
struct batch {
    Source *source;
    enum way way;
    struct command *commands;
    size_t count;
    size_t sent;
    uint64_t first_user_data;
    struct command few[32]; /* saves an allocation */
};

/* ---- Sending ----------------------------------------------------------------------------- */

static void
prepare_passthrough(struct io_uring_sqe *sqe, const Source *source, const struct slot *slot)
{
    const struct nvme_read read = {
        .lba = slot->position,
        .address = slot->address,
        .nsid = source->nsid,
        .blocks = slot->nbytes >> source->lba_shift,
    };
    struct nvme_kernel_cmd cmd;
    kernel_cmd_fill(&cmd, &read, slot->nbytes);
    memcpy((char *)sqe + SQE_COMMAND_OFFSET, &cmd, sizeof(cmd));
    sqe->opcode = IORING_OP_URING_CMD;
    sqe->cmd_op = NVME_URING_CMD_IO;
    if (slot->registered != NOT_REGISTERED) {
        sqe->rw_flags = IORING_URING_CMD_FIXED; /* uring_cmd_flags, the same field */
    }
}

static void
prepare_file_read(struct io_uring_sqe *sqe, const struct slot *slot)
{
    sqe->opcode = slot->registered != NOT_REGISTERED ? IORING_OP_READ_FIXED : IORING_OP_READ;
    sqe->off = slot->position;
    sqe->addr = slot->address;
    sqe->len = slot->nbytes;
}

/* The SQE of a slot whose id is `id`. There is room: slots are no more than SQEs. */
static void
prepare_locked(Ring *self, const struct slot *slot, uint64_t id)
{
    const Source *source = self->table.holders[slot->holder].source;
    struct io_uring_sqe *sqe = io_uring_get_sqe(&self->ring);

    memset(sqe, 0, SQE_BYTES); /* io_uring_get_sqe leaves what the last command wrote */
    if (slot->way == WAY_PASSTHROUGH) {
        prepare_passthrough(sqe, source, slot);
    }
    else {
        prepare_file_read(sqe, slot);
    }
    sqe->fd = source->fd;
    sqe->user_data = id;
    if (slot->registered != NOT_REGISTERED) {
        sqe->buf_index = slot->registered;
        self->counters[slot->way].registered++;
    }
    self->counters[slot->way].submitted++;
}

static void
uncount_locked(Ring *self, const struct slot *slot)
{
    self->counters[slot->way].submitted--;
    self->counters[slot->way].registered -= slot->registered != NOT_REGISTERED;
}

/* Takes back the commands that the kernel has not consumed, and returns their number. It reads the
 * queue only inside io_uring_enter, so they are still ours; with a polling thread they are not. */
static size_t
take_back_locked(Ring *self)
{
    struct io_uring_sq *sq = &self->ring.sq;
    if (self->setup_flags & IORING_SETUP_SQPOLL) {
        return 0;
    }
    const unsigned head = io_uring_smp_load_acquire(sq->khead);
    const unsigned tail = sq->sqe_tail;
    size_t taken_back = 0;
    for (unsigned i = head; i != tail; i++) {
        const struct io_uring_sqe *sqe = &sq->sqes[(size_t)(i & sq->ring_mask) * 2];
        struct slot *slot = inflight_find(&self->table, sqe->user_data);
        if (slot != NULL) {
            uncount_locked(self, slot);
            inflight_undo(&self->table, slot);
            taken_back++;
        }
    }
    sq->sqe_head = sq->sqe_tail = head;
    io_uring_smp_store_release(sq->ktail, head);
    return taken_back;
}

/* Sends what is prepared. 0, or a positive errno if the kernel did not take all of it. */
static int
enter_locked(Ring *self)
{
    int result;
    do {
        result = io_uring_submit(&self->ring);
    } while (result == -EINTR || (result > 0 && !(self->setup_flags & IORING_SETUP_SQPOLL) &&
                                  io_uring_sq_ready(&self->ring) > 0));
    if (result < 0) {
        return -result;
    }
    /* Nothing taken and no error: the kernel had no memory for a request. */
    return result == 0 && io_uring_sq_ready(&self->ring) > 0 ? EAGAIN : 0;
}

/* The same, until the kernel has memory for it. */
static void
enter_at_last_locked(Ring *self)
{
    while (enter_locked(self) == EAGAIN) {
    }
}

void
ring_send_own_locked(Ring *self, uint8_t opcode, unsigned count)
{
    for (unsigned i = 0; i < count; i++) {
        struct io_uring_sqe *sqe = io_uring_get_sqe(&self->ring);
        if (sqe == NULL) {
            break; /* a polling thread is busy with others, and will wake the leader for them */
        }
        memset(sqe, 0, SQE_BYTES);
        sqe->opcode = opcode;
        sqe->user_data = OWN_ID;
        if (opcode == IORING_OP_ASYNC_CANCEL) {
            sqe->cancel_flags = IORING_ASYNC_CANCEL_ANY | IORING_ASYNC_CANCEL_ALL;
        }
    }
    enter_at_last_locked(self);
}

bool
ring_resend_locked(Ring *self, struct slot *slot, uint64_t id, int32_t res)
{
    if (slot->registered == NOT_REGISTERED || slot->way != WAY_PASSTHROUGH ||
        (res != -EINVAL && res != -ENOMEM)) {
        return false;
    }
    if (slot->nbytes <= self->registered_most) {
        self->registered_most = slot->nbytes - 1;
    }
    uncount_locked(self, slot);
    slot->registered = NOT_REGISTERED;
    prepare_locked(self, slot, id);
    enter_at_last_locked(self);
    return true;
}

/* Takes a slot and an SQE for one command of a batch. */
static void
start_locked(Ring *self, const struct batch *batch, uint32_t holder, size_t index)
{
    const struct command *command = &batch->commands[index];
    const struct slot slot = {
        .user_data = batch->first_user_data + index,
        .position = command->position,
        .address = command->address,
        .nbytes = command->nbytes,
        .holder = holder,
        .way = (uint16_t)batch->way,
        .registered = command->registered,
    };
    prepare_locked(self, &slot, inflight_take(&self->table, slot));
}

/* Sends a batch, in as many pieces as the free slots make of it. */
static int
send_locked(Ring *self, struct batch *batch, uint32_t holder)
{
    while (batch->sent < batch->count) {
        if (self->state != RING_OPEN) {
            return STREAM_CLOSED;
        }
        if (self->table.free_count == 0) {
            ring_reap_locked(self);
        }
        size_t piece = batch->count - batch->sent;
        if (piece > self->table.free_count) {
            piece = self->table.free_count;
        }
        int result = EAGAIN;
        if (piece > 0) {
            if (!inflight_reserve(&self->table, piece)) {
                return NO_MEMORY;
            }
            for (size_t i = 0; i < piece; i++) {
                start_locked(self, batch, holder, batch->sent + i);
            }
            Py_BEGIN_ALLOW_THREADS
            result = enter_locked(self);
            Py_END_ALLOW_THREADS
            batch->sent += piece - (result != 0 ? take_back_locked(self) : 0);
        }
        if (result == EAGAIN || result == EBUSY) {
            /* No slot, or no memory for a request: both come back with a completion. */
            if (inflight_count(&self->table) == 0) {
                return result;
            }
            result = ring_wait_locked(self, 1, NO_DEADLINE);
        }
        if (result != DONE) {
            return result;
        }
    }
    return DONE;
}

static void
note_what_was_sent(const struct batch *batch)
{
    PyObject *note = PyUnicode_FromFormat(
        "%zu of %zu commands were submitted before this and will complete, user_data %llu up",
        batch->sent, batch->count, (unsigned long long)batch->first_user_data);
    compat_add_note(note);
    Py_XDECREF(note);
}

/* Sends a checked batch, and gives its commands their user_data. -1 with an exception. */
static int
send_batch(Ring *self, struct batch *batch, PyObject *user_data)
{
    if (user_data != NULL && user_data != Py_None) {
        batch->first_user_data = PyLong_AsUnsignedLongLong(user_data);
        if (batch->first_user_data == UINT64_MAX && PyErr_Occurred()) {
            return -1;
        }
        if (batch->count > 0 && batch->count - 1 > UINT64_MAX - batch->first_user_data) {
            PyErr_Format(PyExc_OverflowError, "user_data %R and %zu commands: beyond 2**64-1",
                         user_data, batch->count);
            return -1;
        }
    }
    ring_lock(self);
    if (user_data == NULL || user_data == Py_None) {
        batch->first_user_data = self->next_token;
        self->next_token += batch->count;
    }
    int result = self->state == RING_OPEN ? DONE : STREAM_CLOSED;
    if (result == DONE) {
        uint32_t holder = holder_for(&self->table, batch->source);
        if (holder == NOBODY) {
            result = source_is_closed(batch->source) ? SOURCE_IS_CLOSED : NO_MEMORY;
        }
        else {
            result = send_locked(self, batch, holder);
            holder_drop(&self->table, holder);
        }
    }
    ring_unlock(self);
    if (result == DONE) {
        return 0;
    }
    if (result == SOURCE_IS_CLOSED) {
        PyErr_Format(PyExc_ValueError, "%S is closed", batch->source->path);
    }
    else {
        ring_raise(result, "io_uring_enter");
    }
    if (batch->sent > 0) {
        note_what_was_sent(batch);
    }
    return -1;
}

/* ---- Checking ---------------------------------------------------------------------------- */

/* The registered buffer that holds all of the range, or NOT_REGISTERED. */
static inline uint16_t
registered_buffer(const Ring *self, uint64_t offset, uint32_t nbytes)
{
    const uint64_t first = offset >> REGISTERED_SHIFT;
    const uint64_t last = (offset + nbytes - 1) >> REGISTERED_SHIFT;
    return first == last && first < self->registered ? (uint16_t)first : NOT_REGISTERED;
}

/* ValueError for the first command that may not be sent. Returns -1. */
static int
refuse(const Ring *self, const Source *source, Py_ssize_t index, const struct nvme_read *read)
{
    const uint64_t nbytes = (uint64_t)read->blocks << source->lba_shift;
    const unsigned long long lba = read->lba;
    char address[19]; /* PyErr_Format knows no %llx before Python 3.12, and %p a "(nil)" */
    snprintf(address, sizeof(address), "0x%llx", (unsigned long long)read->address);

    if (read->nsid != source->nsid) {
        PyErr_Format(PyExc_ValueError, "command %zd: namespace_id is %u, and %S has %u", index,
                     read->nsid, source->path, source->nsid);
    }
    else if (read->lba >= source->capacity || read->blocks > source->capacity - read->lba) {
        PyErr_Format(PyExc_ValueError,
                     "command %zd: starting_lba %llu and %u blocks end beyond the capacity of %S, "
                     "%llu blocks",
                     index, lba, read->blocks, source->path, (unsigned long long)source->capacity);
    }
    else if (nbytes > source->max_transfer) {
        PyErr_Format(PyExc_ValueError,
                     "command %zd: blocks is %u, %llu bytes, and %S transfers at most %u at a "
                     "time: split the command",
                     index, read->blocks, (unsigned long long)nbytes, source->path,
                     source->max_transfer);
    }
    else if (read->address & 3) {
        PyErr_Format(PyExc_ValueError,
                     "command %zd: dest_bar1_ptr %s is not a multiple of 4: the drive can't "
                     "write there, and the kernel would copy",
                     index, address);
    }
    else {
        PyErr_Format(PyExc_ValueError,
                     "command %zd: dest_bar1_ptr %s and %llu bytes lie outside the stream's "
                     "buffer, %zd bytes at %p",
                     index, address, (unsigned long long)nbytes, self->memory.len,
                     self->memory.buf);
    }
    return -1;
}

/* 64 bytes of the caller's, as a command that may be sent. -1 with ValueError. */
static inline int
check_command(const Ring *self, const Source *source, const unsigned char *wire, Py_ssize_t index,
              struct command *command)
{
    struct nvme_read read;
    const char *wrong = wire_decode(wire, &read);
    if (wrong != NULL) {
        PyErr_Format(PyExc_ValueError, "command %zd: %s", index, wrong);
        return -1;
    }
    const uint64_t nbytes = (uint64_t)read.blocks << source->lba_shift;
    const uint64_t room = (uint64_t)self->memory.len;
    const uint64_t offset = read.address - (uintptr_t)self->memory.buf; /* below it: wraps, huge */
    if (read.nsid != source->nsid || read.lba >= source->capacity ||
        read.blocks > source->capacity - read.lba || nbytes > source->max_transfer ||
        offset >= room || nbytes > room - offset || read.address & 3) {
        return refuse(self, source, index, &read);
    }
    command->position = read.lba;
    command->address = read.address;
    command->nbytes = (uint32_t)nbytes;
    /* What it can't map of a registered buffer Linux 6.12 copies, and says nothing: its own pages
     * are then the drive's target (blk_rq_map_user_iov). Unregistered memory it maps or refuses. */
    command->registered = nbytes <= self->registered_most && nbytes <= source->safe_transfer
                              ? registered_buffer(self, offset, (uint32_t)nbytes)
                              : NOT_REGISTERED;
    return 0;
}

static int
check_commands(const Ring *self, struct batch *batch, const Py_buffer *wire)
{
    if (wire->len % WIRE_BYTES != 0) {
        PyErr_Format(PyExc_ValueError, "commands has %zd bytes, not a multiple of 64", wire->len);
        return -1;
    }
    if (batch->source->metadata_size != 0) {
        PyErr_Format(PyExc_ValueError,
                     "%S is formatted with %u bytes of metadata a block, which gdsdirect does not "
                     "transfer: use a namespace formatted without",
                     batch->source->path, batch->source->metadata_size);
        return -1;
    }
    batch->count = (size_t)wire->len / WIRE_BYTES;
    if (batch->count > sizeof(batch->few) / sizeof(batch->few[0])) {
        batch->commands = PyMem_New(struct command, batch->count);
        if (batch->commands == NULL) {
            PyErr_NoMemory();
            return -1;
        }
    }
    const unsigned char *bytes = wire->buf;
    for (size_t i = 0; i < batch->count; i++) {
        if (check_command(self, batch->source, bytes + i * WIRE_BYTES, (Py_ssize_t)i,
                          &batch->commands[i]) < 0) {
            return -1;
        }
    }
    return 0;
}

/* ---- submit_nvme_passthrough ------------------------------------------------------------- */

/* The Source that `object` keeps as _source, a new reference; NULL without an exception: none. */
static Source *
source_of(Ring *self, PyObject *object)
{
    PyObject *source = PyObject_GetAttr(object, self->module->source_name);
    if (source == NULL) {
        if (PyErr_ExceptionMatches(PyExc_AttributeError)) {
            PyErr_Clear();
        }
        return NULL;
    }
    if (!Py_IS_TYPE(source, self->module->source_type)) {
        Py_CLEAR(source);
    }
    return (Source *)source;
}

static Source *
namespace_source(Ring *self, PyObject *object)
{
    Source *source = source_of(self, object);
    if ((source == NULL && !PyErr_Occurred()) || (source != NULL && !source->is_nvme)) {
        PyErr_Format(PyExc_TypeError, "namespace must be a gdsdirect.Namespace, not '%.100s'",
                     Py_TYPE(object)->tp_name);
        Py_CLEAR(source);
    }
    return source;
}

/* One keyword, user_data, after `positional` arguments. -1 with TypeError. */
static int
only_user_data(const char *call, Py_ssize_t positional, PyObject *const *args, Py_ssize_t nargs,
               PyObject *keywords, PyObject **user_data)
{
    Py_ssize_t named = keywords ? PyTuple_GET_SIZE(keywords) : 0;
    *user_data = NULL;
    if (nargs == positional && named == 0) {
        return 0;
    }
    if (nargs == positional && named == 1 &&
        PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(keywords, 0), "user_data") == 0) {
        *user_data = args[nargs];
        return 0;
    }
    PyErr_Format(PyExc_TypeError, "the arguments are %s", call);
    return -1;
}

static PyObject *
range_of(uint64_t first, size_t count)
{
    PyObject *start = PyLong_FromUnsignedLongLong(first);
    PyObject *length = PyLong_FromSize_t(count);
    PyObject *stop = start && length ? PyNumber_Add(start, length) : NULL;
    PyObject *range =
        stop ? PyObject_CallFunctionObjArgs((PyObject *)&PyRange_Type, start, stop, NULL) : NULL;
    Py_XDECREF(start);
    Py_XDECREF(length);
    Py_XDECREF(stop);
    return range;
}

PyObject *
ring_submit_nvme_passthrough(Ring *self, PyObject *const *args, Py_ssize_t nargs,
                             PyObject *keywords)
{
    PyObject *user_data, *tokens = NULL;
    Py_buffer wire;
    struct batch batch = {.way = WAY_PASSTHROUGH, .commands = batch.few};

    if (only_user_data("submit_nvme_passthrough(namespace, commands, *, user_data=None)", 2, args,
                       nargs, keywords, &user_data) < 0 ||
        ring_check_caller(self) < 0) {
        return NULL;
    }
    batch.source = namespace_source(self, args[0]);
    if (batch.source == NULL) {
        return NULL;
    }
    if (PyObject_GetBuffer(args[1], &wire, PyBUF_SIMPLE) < 0) {
        Py_DECREF(batch.source);
        return NULL;
    }
    if (check_commands(self, &batch, &wire) == 0 && send_batch(self, &batch, user_data) == 0) {
        tokens = range_of(batch.first_user_data, batch.count);
    }
    if (batch.commands != batch.few) {
        PyMem_Free(batch.commands);
    }
    PyBuffer_Release(&wire);
    Py_DECREF(batch.source);
    return tokens;
}

/* ---- submit_read, submit_read_fixed ------------------------------------------------------ */

/* What messages call a file: its name, if it has one. */
static PyObject *
name_of(PyObject *file, int fd)
{
    PyObject *name = PyObject_GetAttrString(file, "name");
    if (name != NULL && PyUnicode_Check(name)) {
        return name;
    }
    PyErr_Clear();
    Py_XDECREF(name);
    return PyUnicode_FromFormat("file descriptor %d", fd);
}

/* A Source on a descriptor of its own, since the caller's may be closed and its number reused
 * while the batch waits for room. */
static Source *
file_source(Ring *self, PyObject *file)
{
    Source *source = source_of(self, file);
    if (source != NULL || PyErr_Occurred()) {
        if (source != NULL && source->is_nvme) {
            PyErr_Format(PyExc_TypeError,
                         "%S is an NVMe namespace: read it with submit_nvme_passthrough",
                         source->path);
            Py_CLEAR(source);
        }
        return source;
    }
    int fd = PyObject_AsFileDescriptor(file);
    PyObject *name = fd >= 0 ? name_of(file, fd) : NULL;
    if (name == NULL) {
        return NULL;
    }
    int own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (own < 0) {
        ring_raise_errno(errno, "duplicating the descriptor", name);
    }
    else {
        source = (Source *)PyObject_CallFunction((PyObject *)self->module->source_type, "iO", own,
                                                 name);
        if (source == NULL) {
            close(own);
        }
    }
    Py_DECREF(name);
    return source;
}

/* `integer` as an int64 in 0..most. -1 with an exception that names it. */
static int
in_range(PyObject *integer, const char *name, int64_t least, int64_t most, int64_t *out)
{
    PyObject *number = PyNumber_Index(integer);
    if (number == NULL) {
        return -1;
    }
    int overflow;
    *out = PyLong_AsLongLongAndOverflow(number, &overflow);
    int failed = *out == -1 && !overflow && PyErr_Occurred();
    if (!failed && (overflow || *out < least || *out > most)) {
        PyErr_Format(PyExc_ValueError, "%s is %S, outside %lld..%lld", name, number,
                     (long long)least, (long long)most);
        failed = 1;
    }
    Py_DECREF(number);
    return failed ? -1 : 0;
}

static int
check_file_read(const Ring *self, struct command *command, PyObject *file_offset, PyObject *nbytes,
                PyObject *target_offset)
{
    int64_t position, length, target;
    const int64_t room = self->memory.len;
    if (in_range(nbytes, "nbytes", 1, room < MOST_BYTES ? room : MOST_BYTES, &length) < 0 ||
        in_range(target_offset, "target_offset", 0, room - length, &target) < 0 ||
        in_range(file_offset, "file_offset", 0, INT64_MAX - length, &position) < 0) {
        return -1;
    }
    command->position = (uint64_t)position;
    command->address = (uintptr_t)self->memory.buf + (uint64_t)target;
    command->nbytes = (uint32_t)length;
    command->registered = registered_buffer(self, (uint64_t)target, (uint32_t)length);
    return 0;
}

/* Why a read can't go into registered memory: stream.py has the words. Returns -1. */
static int
refuse_fixed(Ring *self)
{
    if (self->registered > 0) {
        PyErr_SetString(PyExc_ValueError,
                        "the target crosses a multiple of 1 GiB in the buffer, and the kernel "
                        "registers no more in one piece: split the read there");
        return -1;
    }
    PyObject *error = PyObject_CallMethod((PyObject *)self, "_registration_error", "i",
                                          self->register_errno);
    if (error != NULL) {
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
        Py_DECREF(error);
    }
    return -1;
}

static PyObject *
submit_file_read(Ring *self, PyObject *args, PyObject *kwargs, bool fixed)
{
    static char *names[] = {"file",      "file_offset", "nbytes", "target_offset",
                            "user_data", NULL};
    PyObject *file, *file_offset, *nbytes, *target_offset, *user_data = NULL, *token = NULL;
    struct batch batch = {.commands = batch.few, .count = 1};

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO|$O", names, &file, &file_offset, &nbytes,
                                     &target_offset, &user_data) ||
        check_file_read(self, batch.few, file_offset, nbytes, target_offset) < 0 ||
        ring_check_caller(self) < 0) {
        return NULL;
    }
    if (!fixed) {
        batch.few[0].registered = NOT_REGISTERED;
    }
    else if (batch.few[0].registered == NOT_REGISTERED && refuse_fixed(self) < 0) {
        return NULL;
    }
    batch.source = file_source(self, file);
    if (batch.source == NULL) {
        return NULL;
    }
    /* Without O_DIRECT the page cache copies, whatever the opcode. */
    batch.way = !batch.source->is_direct ? WAY_BUFFERED : fixed ? WAY_FILE_FIXED : WAY_FILE_DIRECT;
    if (send_batch(self, &batch, user_data) == 0) {
        token = PyLong_FromUnsignedLongLong(batch.first_user_data);
    }
    Py_DECREF(batch.source);
    return token;
}

PyObject *
ring_submit_read(Ring *self, PyObject *args, PyObject *kwargs)
{
    return submit_file_read(self, args, kwargs, false);
}

PyObject *
ring_submit_read_fixed(Ring *self, PyObject *args, PyObject *kwargs)
{
    return submit_file_read(self, args, kwargs, true);
}
