/*
 * Commands in: checked, rewritten into the kernel's form, sent.
 */
#include "ring.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

#include "arrays.h"
#include "nvme_abi.h"

#define SQE_BYTES 128
#define SQE_COMMAND_OFFSET 48 /* struct io_uring_sqe, cmd[]: 80 bytes with IORING_SETUP_SQE128 */
#define REGISTERED_SHIFT 30   /* a registered buffer has at most 1 GiB (io_uring/rsrc.c) */
#define MOST_FAULTS 20
#define MOST_BYTES INT64_C(0x7FFFF000) /* of one read: MAX_RW_COUNT, include/linux/fs.h */

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

/* Commands from one source, one way. */
struct batch {
    Source *source; /* a reference of the batch's own */
    bool lasting;   /* the source outlives the call, so that registering its file is worth it */
    enum way way;
    uint32_t holder;
    struct command *commands;
    size_t count;
    size_t sent;
    uint64_t first_user_data;
    int failed;             /* errno of NO_DESCRIPTOR */
    struct command few[64]; /* saves an allocation */
};

/* Room for `count` commands. -1 with MemoryError. */
static int
batch_allocate(struct batch *batch, size_t count)
{
    batch->count = count;
    batch->commands = batch->few;
    if (count > sizeof(batch->few) / sizeof(batch->few[0])) {
        batch->commands = PyMem_New(struct command, count);
        if (batch->commands == NULL) {
            PyErr_NoMemory();
            return -1;
        }
    }
    return 0;
}

static void
batch_clear(struct batch *batch)
{
    if (batch->commands != batch->few) {
        PyMem_Free(batch->commands);
    }
    Py_XDECREF(batch->source);
}

/* ---- Registered files -------------------------------------------------------------------- */

/* Has the kernel hold a source's file, which it then needs not look up and hold for each command. */
static void
register_file_locked(Ring *self, uint32_t index)
{
    struct holder *holder = &self->table.holders[index];
    if (holder->registered || !self->registers_files || index >= REGISTERED_FILES) {
        return;
    }
    const int fd = holder->source->fd;
    if (io_uring_register_files_update(&self->ring, index, &fd, 1) == 1) {
        holder->registered = true;
        gdsdirect_source_release(holder->source); /* it may be closed: the kernel has the file */
    }
}

void
ring_forget_closed_locked(Ring *self)
{
    const uint32_t closings = atomic_load(&self->module->closings);
    if (closings == self->closings_seen) {
        return;
    }
    self->closings_seen = closings;
    for (uint32_t i = 0; i < self->table.holders_allocated; i++) {
        struct holder *holder = &self->table.holders[i];
        if (!holder->registered || !source_is_closed(holder->source)) {
            continue;
        }
        if (holder_is_busy(holder)) {
            self->closings_seen = closings - 1; /* look again when it may not be */
            continue;
        }
        const int none = -1;
        io_uring_register_files_update(&self->ring, i, &none, 1);
        holder_finish(&self->table, i);
    }
}

/* ---- Sending ----------------------------------------------------------------------------- */

/* What the SQEs of one source have in common: a copy, which stays in registers. */
struct target {
    int fd;
    uint8_t flags;
    uint32_t nsid; /* 0: a file */
    uint32_t lba_shift;
};

static inline struct target
target_of(const Ring *self, uint32_t index)
{
    const struct holder *holder = &self->table.holders[index];
    return (struct target){
        .fd = holder->registered ? (int)index : holder->source->fd,
        .flags = holder->registered ? IOSQE_FIXED_FILE : 0,
        .nsid = holder->source->nsid,
        .lba_shift = holder->source->lba_shift,
    };
}

static inline void
prepare_passthrough(struct io_uring_sqe *sqe, const struct target *target, const struct slot *slot)
{
    const struct nvme_read read = {
        .lba = slot->position,
        .address = slot->address,
        .nsid = target->nsid,
        .blocks = slot->nbytes >> target->lba_shift,
    };
    kernel_cmd_fill((void *)((char *)sqe + SQE_COMMAND_OFFSET), &read, slot->nbytes);
    sqe->opcode = IORING_OP_URING_CMD;
    sqe->cmd_op = NVME_URING_CMD_IO;
    if (slot->registered != NOT_REGISTERED) {
        sqe->rw_flags = IORING_URING_CMD_FIXED; /* uring_cmd_flags, the same field */
    }
}

static inline void
prepare_file_read(struct io_uring_sqe *sqe, const struct slot *slot)
{
    sqe->opcode = slot->registered != NOT_REGISTERED ? IORING_OP_READ_FIXED : IORING_OP_READ;
    sqe->off = slot->position;
    sqe->addr = slot->address;
    sqe->len = slot->nbytes;
}

/* In halves: for all at once gcc takes `rep stos`, which starts slowly, and not eight stores. */
static inline void
clear_sqe(struct io_uring_sqe *sqe)
{
    memset(sqe, 0, SQE_BYTES / 2);
    memset((char *)sqe + SQE_BYTES / 2, 0, SQE_BYTES / 2);
}

/* An SQE, with what the last command wrote there: io_uring_get_sqe leaves it. Slots are no more than
 * SQEs, but a polling thread posts CQEs before it says that it has consumed the SQEs they are of; it
 * says so a moment later. */
static inline struct io_uring_sqe *
next_sqe_locked(Ring *self)
{
    struct io_uring_sqe *sqe;
    while ((sqe = io_uring_get_sqe(&self->ring)) == NULL) {
        io_uring_sqring_wait(&self->ring);
    }
    return sqe;
}

/* The SQE of a slot whose id is `id`. */
static inline void
prepare_locked(Ring *self, const struct target *target, const struct slot *slot, uint64_t id)
{
    struct io_uring_sqe *sqe = next_sqe_locked(self);
    clear_sqe(sqe);
    if (target->nsid != 0) {
        prepare_passthrough(sqe, target, slot);
    }
    else {
        prepare_file_read(sqe, slot);
    }
    sqe->fd = target->fd;
    sqe->flags = target->flags;
    if (slot->registered != NOT_REGISTERED) {
        sqe->buf_index = slot->registered;
    }
    sqe->user_data = id;
}

/* Takes back the commands that the kernel has not consumed, and returns their number. It reads the
 * queue only inside io_uring_enter, so they are still ours; with a polling thread they are not. */
static size_t
take_back_locked(Ring *self, struct batch *batches, size_t n)
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
        if (slot == NULL) {
            continue;
        }
        for (struct batch *batch = batches; batch < batches + n; batch++) {
            batch->sent -= slot->user_data - batch->first_user_data < batch->count;
        }
        self->counters[slot->way].submitted--;
        self->counters[slot->way].registered -= slot->registered != NOT_REGISTERED;
        inflight_undo(&self->table, slot);
        taken_back++;
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
        clear_sqe(sqe);
        sqe->opcode = opcode;
        sqe->user_data = OWN_ID;
        if (opcode == IORING_OP_ASYNC_CANCEL) {
            sqe->cancel_flags = IORING_ASYNC_CANCEL_ANY | IORING_ASYNC_CANCEL_ALL;
        }
    }
    enter_at_last_locked(self);
}

static bool
may_go_unregistered(const Ring *self, const struct slot *slot)
{
    const Memory *memory = (const Memory *)self->memory.obj;
    return !memory->exposed || alias_is_held(memory->aliases, slot->address, slot->nbytes);
}

bool
ring_resend_locked(Ring *self, struct slot *slot, uint64_t id, int32_t res)
{
    if (slot->way != WAY_PASSTHROUGH) {
        return false;
    }
    if (res == -EFAULT && slot->faults < MOST_FAULTS) {
        slot->faults++;
    }
    else if (slot->registered != NOT_REGISTERED && (res == -EINVAL || res == -ENOMEM) &&
             may_go_unregistered(self, slot)) {
        if (slot->nbytes <= self->registered_most) {
            self->registered_most = slot->nbytes - 1;
        }
        self->counters[slot->way].registered--;
        slot->registered = NOT_REGISTERED;
    }
    else {
        return false;
    }
    const struct target target = target_of(self, slot->holder);
    prepare_locked(self, &target, slot, id);
    enter_at_last_locked(self);
    return true;
}

/* Takes slots and SQEs for the next `count` commands of a batch. */
static void
start_locked(Ring *self, struct batch *batch, size_t count)
{
    const struct target target = target_of(self, batch->holder);
    const struct command *commands = &batch->commands[batch->sent];
    uint64_t registered = 0;
    struct slot slot = {
        .user_data = batch->first_user_data + batch->sent,
        .holder = batch->holder,
        .way = (uint8_t)batch->way,
    };
    for (size_t i = 0; i < count; i++) {
        slot.position = commands[i].position;
        slot.address = commands[i].address;
        slot.nbytes = commands[i].nbytes;
        slot.registered = commands[i].registered;
        registered += slot.registered != NOT_REGISTERED;
        prepare_locked(self, &target, &slot, inflight_take(&self->table, slot));
        slot.user_data++;
    }
    self->table.holders[batch->holder].flying += (uint32_t)count;
    self->counters[batch->way].submitted += count;
    self->counters[batch->way].registered += registered;
    batch->sent += count;
}

/* Prepares what there is room for, and returns its number. Batches share the slots, so that a slow
 * drive can't take those that would keep a fast one busy. */
static size_t
start_batches_locked(Ring *self, struct batch *batches, size_t n)
{
    size_t unsent = 0, started = 0;
    for (size_t i = 0; i < n; i++) {
        unsent += batches[i].sent < batches[i].count;
    }
    for (size_t i = 0; i < n; i++) {
        struct batch *batch = &batches[i];
        const size_t share = (self->table.depth + unsent - 1) / unsent;
        const size_t flying = self->table.holders[batch->holder].flying;
        size_t piece = share > flying ? share - flying : 0;
        if (piece > self->table.free_count) {
            piece = self->table.free_count;
        }
        if (piece > batch->count - batch->sent) {
            piece = batch->count - batch->sent;
        }
        start_locked(self, batch, piece);
        started += piece;
    }
    return started;
}

/* Sends batches, in as many pieces as the free slots make of them. */
static int
send_locked(Ring *self, struct batch *batches, size_t n, size_t left)
{
    while (left > 0) {
        if (self->state != RING_OPEN) {
            return STREAM_CLOSED;
        }
        if (self->table.free_count == 0) {
            ring_reap_locked(self);
        }
        const size_t room = self->table.free_count;
        if (!inflight_reserve(&self->table, left < room ? left : room)) {
            return NO_MEMORY;
        }
        int result = EAGAIN;
        const size_t started = start_batches_locked(self, batches, n);
        if (started > 0) {
            Py_BEGIN_ALLOW_THREADS
            result = enter_locked(self);
            Py_END_ALLOW_THREADS
            left -= started - (result != 0 ? take_back_locked(self, batches, n) : 0);
        }
        if (result == EAGAIN || result == EBUSY) {
            /* No slot, or no memory for a request: both come back with a completion. */
            if (inflight_count(&self->table) == 0 || batches->source->borrowed) {
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

/* Where the batches don't fit at once, gives those that borrow a descriptor one of their own: the
 * caller's may be closed, and its number reused, while they wait for room. */
static int
own_descriptors_locked(Ring *self, struct batch *batches, size_t n, size_t commands)
{
    for (size_t i = 0; i < n && commands > self->table.free_count; i++) {
        if (!gdsdirect_source_own(batches[i].source)) {
            batches[i].failed = errno;
            return NO_DESCRIPTOR;
        }
    }
    return DONE;
}

/* Holds the batches' sources while `send_locked` works. */
static int
hold_and_send_locked(Ring *self, struct batch *batches, size_t n, size_t commands)
{
    int result = self->state == RING_OPEN ? DONE : STREAM_CLOSED;
    size_t held = 0;
    while (result == DONE && held < n) {
        struct batch *batch = &batches[held];
        batch->holder = holder_for(&self->table, batch->source, batch->lasting);
        if (batch->holder == NOBODY) {
            result = source_is_closed(batch->source) ? SOURCE_IS_CLOSED : NO_MEMORY;
            break;
        }
        if (batch->lasting) {
            register_file_locked(self, batch->holder);
        }
        held++;
    }
    if (result == DONE) {
        result = own_descriptors_locked(self, batches, n, commands);
    }
    if (result == DONE) {
        result = send_locked(self, batches, n, commands);
    }
    while (held > 0) {
        holder_drop(&self->table, batches[--held].holder, 1);
    }
    return result;
}

/* The exception for batches that were not sent, or not whole. Returns -1. */
static int
raise_unsent(int result, const struct batch *batches, size_t n)
{
    if (result == SOURCE_IS_CLOSED) {
        const struct batch *closed = batches;
        while (!source_is_closed(closed->source)) {
            closed++;
        }
        PyErr_Format(PyExc_ValueError, "%S is closed", closed->source->path);
    }
    else if (result == NO_DESCRIPTOR) { /* files are read a batch at a time */
        ring_raise_errno(batches->failed, "duplicating the descriptor", batches->source->path);
    }
    else {
        ring_raise(result, "io_uring_enter");
    }
    for (const struct batch *batch = batches; batch < batches + n; batch++) {
        if (batch->sent > 0) {
            PyObject *note = PyUnicode_FromFormat(
                "%zu of %zu commands were submitted before this and will complete, user_data "
                "%llu up",
                batch->sent, batch->count, (unsigned long long)batch->first_user_data);
            compat_add_note(note);
            Py_XDECREF(note);
        }
    }
    return -1;
}

/* Sends checked batches, and gives their commands their user_data, which count up through all of
 * them. -1 with an exception. */
static int
send_batches(Ring *self, struct batch *batches, size_t n, PyObject *user_data)
{
    const bool given = user_data != NULL && user_data != Py_None;
    uint64_t first = 0;
    size_t commands = 0;
    for (size_t i = 0; i < n; i++) {
        commands += batches[i].count;
    }
    if (given) {
        first = PyLong_AsUnsignedLongLong(user_data);
        if (first == UINT64_MAX && PyErr_Occurred()) {
            return -1;
        }
        if (commands > 0 && commands - 1 > UINT64_MAX - first) {
            PyErr_Format(PyExc_OverflowError, "user_data %R and %zu commands: beyond 2**64-1",
                         user_data, commands);
            return -1;
        }
    }
    ring_lock(self);
    ring_forget_closed_locked(self);
    if (!given) {
        first = self->next_token;
        self->next_token += commands;
    }
    for (size_t i = 0; i < n; i++) {
        batches[i].first_user_data = first;
        first += batches[i].count;
    }
    int result = hold_and_send_locked(self, batches, n, commands);
    ring_unlock(self);
    return result == DONE ? 0 : raise_unsent(result, batches, n);
}

/* ---- Checking ---------------------------------------------------------------------------- */

/* What commands are held to: a copy of the ring's and the source's, which stays in registers. */
struct bounds {
    uint64_t start; /* of the stream's buffer */
    uint64_t room;
    uint64_t capacity;
    uint32_t nsid;
    uint32_t lba_shift;
    uint32_t max_transfer;
    uint32_t registered;      /* buffers */
    uint32_t most_registered; /* bytes of a command that goes into one */
    struct aliases *exposed;  /* where to look whether the command's is; NULL: none is */
};

#define ALIAS_IN_USE \
    "dest_bar1_ptr, cut to 32 bits, is the address of other memory of this process, which Linux " \
    "could overwrite instead when a worker thread of its own sends the command: use another " \
    "buffer, or one that is registered"

/* The registered buffer that holds all of the range, or NOT_REGISTERED. */
static inline uint16_t
registered_buffer(uint32_t registered, uint64_t offset, uint32_t nbytes)
{
    const uint64_t first = offset >> REGISTERED_SHIFT;
    const uint64_t last = (offset + nbytes - 1) >> REGISTERED_SHIFT;
    return first == last && first < registered ? (uint16_t)first : NOT_REGISTERED;
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

/* 64 bytes of the caller's, as a command that may be sent. False: `read` breaks a rule, or `wrong` says
 * what is. */
static inline bool
check_command(const struct bounds *bounds, const unsigned char *wire, struct command *command,
              struct nvme_read *read, const char **wrong)
{
    *wrong = wire_decode(wire, read);
    if (*wrong != NULL) {
        return false;
    }
    const uint64_t nbytes = (uint64_t)read->blocks << bounds->lba_shift;
    const uint64_t offset = read->address - bounds->start; /* below it: wraps, huge */
    if (read->nsid != bounds->nsid || read->lba >= bounds->capacity ||
        read->blocks > bounds->capacity - read->lba || nbytes > bounds->max_transfer ||
        offset >= bounds->room || nbytes > bounds->room - offset || read->address & 3) {
        return false;
    }
    command->position = read->lba;
    command->address = read->address;
    command->nbytes = (uint32_t)nbytes;
    command->registered = nbytes <= bounds->most_registered
                              ? registered_buffer(bounds->registered, offset, (uint32_t)nbytes)
                              : NOT_REGISTERED;
    if (bounds->exposed != NULL && command->registered == NOT_REGISTERED &&
        !alias_is_held(bounds->exposed, read->address, nbytes)) {
        *wrong = ALIAS_IN_USE;
        return false;
    }
    return true;
}

static struct bounds
bounds_of(const Ring *self, const Source *source)
{
    const uint32_t most = self->registered_most;
    const Memory *memory = (const Memory *)self->memory.obj;
    return (struct bounds){
        .start = (uintptr_t)self->memory.buf,
        .room = (uint64_t)self->memory.len,
        .capacity = source->capacity,
        .nsid = source->nsid,
        .lba_shift = source->lba_shift,
        .max_transfer = source->max_transfer,
        .registered = self->registered,
        /* What it can't map of a registered buffer Linux 6.12 copies, and says nothing: its own pages
         * are then the drive's target (blk_rq_map_user_iov). Unregistered memory it maps or refuses. */
        .most_registered = most < source->safe_transfer ? most : source->safe_transfer,
        .exposed = memory->exposed ? memory->aliases : NULL,
    };
}

/* Fills a batch with the commands in `wire`. -1 with ValueError if one of them may not be sent. */
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
    if (batch_allocate(batch, (size_t)wire->len / WIRE_BYTES) < 0) {
        return -1;
    }
    const struct bounds bounds = bounds_of(self, batch->source);
    const unsigned char *bytes = wire->buf;
    for (size_t i = 0; i < batch->count; i++) {
        struct nvme_read read;
        const char *wrong;
        if (!check_command(&bounds, bytes + i * WIRE_BYTES, &batch->commands[i], &read, &wrong)) {
            return wrong != NULL ? (PyErr_Format(PyExc_ValueError, "command %zu: %s", i, wrong), -1)
                                 : refuse(self, batch->source, (Py_ssize_t)i, &read);
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
    PyObject *range = NULL, *start = PyLong_FromUnsignedLongLong(first), *stop = NULL;
    if (start != NULL) {
        stop = count <= UINT64_MAX - first ? PyLong_FromUnsignedLongLong(first + count)
                                           : PyLong_FromString("18446744073709551616", NULL, 10);
    }
    if (stop != NULL) {
        PyObject *const args[] = {start, stop};
        range = PyObject_Vectorcall((PyObject *)&PyRange_Type, args, 2, NULL);
    }
    Py_XDECREF(start);
    Py_XDECREF(stop);
    return range;
}

/* A batch of the packed commands that `object` has, from `namespace`. -1 with an exception; either
 * way batch_clear ends it. */
static int
passthrough_batch(Ring *self, struct batch *batch, PyObject *namespace, PyObject *object)
{
    Py_buffer wire;
    batch->way = WAY_PASSTHROUGH;
    batch->lasting = true;
    batch->commands = batch->few;
    batch->source = namespace_source(self, namespace);
    if (batch->source == NULL || PyObject_GetBuffer(object, &wire, PyBUF_SIMPLE) < 0) {
        return -1;
    }
    int failed = check_commands(self, batch, &wire);
    PyBuffer_Release(&wire);
    return failed;
}

PyObject *
ring_submit_nvme_passthrough(Ring *self, PyObject *const *args, Py_ssize_t nargs,
                             PyObject *keywords)
{
    PyObject *user_data, *tokens = NULL;
    struct batch batch;
    if (only_user_data("submit_nvme_passthrough(namespace, commands, *, user_data=None)", 2, args,
                       nargs, keywords, &user_data) < 0 ||
        ring_check_caller(self) < 0) {
        return NULL;
    }
    batch.sent = 0;
    if (passthrough_batch(self, &batch, args[0], args[1]) == 0 &&
        send_batches(self, &batch, 1, user_data) == 0) {
        tokens = range_of(batch.first_user_data, batch.count);
    }
    batch_clear(&batch);
    return tokens;
}

/* ---- submit_nvme_passthroughs ------------------------------------------------------------ */

/* Batch `index` of the caller's sequence. -1 with an exception that says which one it is. */
static int
passthrough_batch_of(Ring *self, struct batch *batch, PyObject *pair, Py_ssize_t index)
{
    batch->commands = batch->few;
    if (!PyTuple_Check(pair) || PyTuple_GET_SIZE(pair) != 2) {
        PyErr_Format(PyExc_TypeError, "batches[%zd] must be a tuple (namespace, commands)", index);
        return -1;
    }
    if (passthrough_batch(self, batch, PyTuple_GET_ITEM(pair, 0), PyTuple_GET_ITEM(pair, 1)) < 0) {
        PyObject *note = PyUnicode_FromFormat("in batches[%zd]; none was submitted", index);
        compat_add_note(note);
        Py_XDECREF(note);
        return -1;
    }
    return 0;
}

static PyObject *
list_of_ranges(const struct batch *batches, Py_ssize_t n)
{
    PyObject *list = PyList_New(n);
    for (Py_ssize_t i = 0; list != NULL && i < n; i++) {
        PyObject *range = range_of(batches[i].first_user_data, batches[i].count);
        if (range == NULL) {
            Py_CLEAR(list);
            break;
        }
        PyList_SET_ITEM(list, i, range);
    }
    return list;
}

PyObject *
ring_submit_nvme_passthroughs(Ring *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"batches", "user_data", NULL};
    PyObject *given, *user_data = NULL, *tokens = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|$O:submit_nvme_passthroughs", names, &given,
                                     &user_data) ||
        ring_check_caller(self) < 0) {
        return NULL;
    }
    PyObject *pairs = PySequence_Tuple(given); /* a copy: checking runs Python code */
    if (pairs == NULL) {
        return NULL;
    }
    const Py_ssize_t n = PyTuple_GET_SIZE(pairs);
    Py_ssize_t filled = 0;
    struct batch *batches = PyMem_Calloc((size_t)n, sizeof(*batches));
    if (batches == NULL) {
        Py_DECREF(pairs);
        return PyErr_NoMemory();
    }
    int failed = 0;
    while (filled < n && !failed) {
        failed =
            passthrough_batch_of(self, &batches[filled], PyTuple_GET_ITEM(pairs, filled), filled);
        filled++;
    }
    if (!failed && send_batches(self, batches, (size_t)n, user_data) == 0) {
        tokens = list_of_ranges(batches, n);
    }
    while (filled > 0) {
        batch_clear(&batches[--filled]);
    }
    PyMem_Free(batches);
    Py_DECREF(pairs);
    return tokens;
}

/* ---- submit_read, submit_read_fixed ------------------------------------------------------ */

/* What messages call a file: its name, if it has one. */
static PyObject *
name_of(const Ring *self, PyObject *file, int fd)
{
    PyObject *name = PyObject_GetAttr(file, self->module->name_name);
    if (name != NULL && PyUnicode_Check(name)) {
        return name;
    }
    PyErr_Clear();
    Py_XDECREF(name);
    return PyUnicode_FromFormat("file descriptor %d", fd);
}

/* The Source that `file` keeps (`lasting`), or one that borrows the caller's descriptor: the kernel
 * takes the file when it takes the command. */
static Source *
file_source(Ring *self, PyObject *file, bool *lasting)
{
    Source *source = source_of(self, file);
    *lasting = source != NULL;
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
    PyObject *name = fd >= 0 ? name_of(self, file, fd) : NULL;
    if (name == NULL) {
        return NULL;
    }
    source = gdsdirect_source_borrow(self->module->source_type, fd, name);
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

/* The longest read that may be asked for. */
static inline int64_t
most_bytes(const Ring *self)
{
    return self->memory.len < MOST_BYTES ? self->memory.len : MOST_BYTES;
}

static int
check_file_read(const Ring *self, struct command *command, PyObject *file_offset, PyObject *nbytes,
                PyObject *target_offset)
{
    int64_t position, length, target;
    const int64_t room = self->memory.len;
    if (in_range(nbytes, "nbytes", 1, most_bytes(self), &length) < 0 ||
        in_range(target_offset, "target_offset", 0, room - length, &target) < 0 ||
        in_range(file_offset, "file_offset", 0, INT64_MAX - length, &position) < 0) {
        return -1;
    }
    command->position = (uint64_t)position;
    command->address = (uintptr_t)self->memory.buf + (uint64_t)target;
    command->nbytes = (uint32_t)length;
    command->registered = registered_buffer(self->registered, (uint64_t)target, (uint32_t)length);
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
    PyObject *error =
        PyObject_CallMethod((PyObject *)self, "_registration_error", "i", self->register_errno);
    if (error != NULL) {
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
        Py_DECREF(error);
    }
    return -1;
}

/* Settles whether the batch's commands go into registered memory. -1 with an exception. */
static int
settle_registered(Ring *self, struct batch *batch, bool fixed)
{
    for (size_t i = 0; i < batch->count; i++) {
        if (!fixed) {
            batch->commands[i].registered = NOT_REGISTERED;
        }
        else if (batch->commands[i].registered == NOT_REGISTERED) {
            return refuse_fixed(self);
        }
    }
    return 0;
}

/* Without O_DIRECT the page cache copies, whatever the opcode. */
static enum way
way_of(const Source *source, bool fixed)
{
    return !source->is_direct ? WAY_BUFFERED : fixed ? WAY_FILE_FIXED : WAY_FILE_DIRECT;
}

/* Sends a batch of checked reads of `file`. -1 with an exception. */
static int
send_file_reads(Ring *self, struct batch *batch, PyObject *file, bool fixed, PyObject *user_data)
{
    if (settle_registered(self, batch, fixed) < 0) {
        return -1;
    }
    batch->source = file_source(self, file, &batch->lasting);
    if (batch->source == NULL) {
        return -1;
    }
    batch->way = way_of(batch->source, fixed);
    return send_batches(self, batch, 1, user_data);
}

static PyObject *
submit_file_read(Ring *self, PyObject *args, PyObject *kwargs, bool fixed)
{
    static char *names[] = {"file", "file_offset", "nbytes", "target_offset", "user_data", NULL};
    PyObject *file, *file_offset, *nbytes, *target_offset, *user_data = NULL, *token = NULL;
    struct batch batch = {.commands = batch.few, .count = 1};

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO|$O", names, &file, &file_offset, &nbytes,
                                     &target_offset, &user_data) ||
        check_file_read(self, batch.few, file_offset, nbytes, target_offset) < 0 ||
        ring_check_caller(self) < 0) {
        return NULL;
    }
    if (send_file_reads(self, &batch, file, fixed, user_data) == 0) {
        token = PyLong_FromUnsignedLongLong(batch.first_user_data);
    }
    batch_clear(&batch);
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

/* ---- submit_reads, submit_reads_fixed ---------------------------------------------------- */

/* What the caller gave for a batch of reads: arrays, and one size for all or an array of them. */
struct read_arrays {
    Py_buffer offsets;
    Py_buffer sizes;
    Py_buffer targets;
    uint32_t one_size;
    bool has_sizes;
};

static void
read_arrays_release(struct read_arrays *arrays)
{
    PyBuffer_Release(&arrays->offsets);
    PyBuffer_Release(&arrays->sizes);
    PyBuffer_Release(&arrays->targets);
}

static int
read_arrays_get(const Ring *self, struct read_arrays *arrays, PyObject *file_offsets,
                PyObject *nbytes, PyObject *target_offsets)
{
    int64_t size = 0;
    arrays->has_sizes = !is_scalar(nbytes);
    if (get_integers(file_offsets, "file_offsets", 8, &arrays->offsets) < 0 ||
        get_integers(target_offsets, "target_offsets", 8, &arrays->targets) < 0 ||
        (arrays->has_sizes ? get_integers(nbytes, "nbytes", 4, &arrays->sizes)
                           : in_range(nbytes, "nbytes", 1, most_bytes(self), &size)) < 0) {
        return -1;
    }
    arrays->one_size = (uint32_t)size;
    const Py_ssize_t n = arrays->offsets.len / 8;
    if (arrays->targets.len / 8 != n || (arrays->has_sizes && arrays->sizes.len / 4 != n)) {
        PyErr_Format(PyExc_ValueError,
                     "arrays of different lengths: file_offsets %zd, nbytes %zd, target_offsets "
                     "%zd",
                     n, arrays->has_sizes ? arrays->sizes.len / 4 : n, arrays->targets.len / 8);
        return -1;
    }
    return 0;
}

/* Read `index` of the arrays, as a command that may be sent. -1 with ValueError. */
static inline int
check_array_read(const Ring *self, const struct read_arrays *arrays, size_t index,
                 struct command *command)
{
    const uint64_t room = (uint64_t)self->memory.len;
    uint64_t position, target;
    uint32_t nbytes = arrays->one_size;
    memcpy(&position, (const char *)arrays->offsets.buf + index * 8, 8);
    memcpy(&target, (const char *)arrays->targets.buf + index * 8, 8);
    if (arrays->has_sizes) {
        memcpy(&nbytes, (const char *)arrays->sizes.buf + index * 4, 4);
    }
    const bool sized = nbytes >= 1 && nbytes <= most_bytes(self);
    if (!sized || target > room - nbytes || position > (uint64_t)INT64_MAX - nbytes) {
        PyErr_Format(PyExc_ValueError,
                     "read %zu: file_offset is %llu, nbytes %u, target_offset %llu: the buffer has "
                     "%llu bytes, a read at most %lld, and a file ends before 2**63",
                     index, (unsigned long long)position, nbytes, (unsigned long long)target,
                     (unsigned long long)room, (long long)most_bytes(self));
        return -1;
    }
    *command = (struct command){
        .position = position,
        .address = (uintptr_t)self->memory.buf + target,
        .nbytes = nbytes,
        .registered = registered_buffer(self->registered, target, nbytes),
    };
    return 0;
}

static int
check_array_reads(const Ring *self, const struct read_arrays *arrays, struct batch *batch)
{
    if (batch_allocate(batch, (size_t)arrays->offsets.len / 8) < 0) {
        return -1;
    }
    for (size_t i = 0; i < batch->count; i++) {
        if (check_array_read(self, arrays, i, &batch->commands[i]) < 0) {
            return -1;
        }
    }
    return 0;
}

static PyObject *
submit_file_reads(Ring *self, PyObject *args, PyObject *kwargs, bool fixed)
{
    static char *names[] = {"file", "file_offsets", "nbytes", "target_offsets", "user_data", NULL};
    PyObject *file, *file_offsets, *nbytes, *target_offsets, *user_data = NULL, *tokens = NULL;
    struct read_arrays arrays = {0};
    struct batch batch;
    batch.sent = 0;
    batch.source = NULL;
    batch.commands = batch.few;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO|$O", names, &file, &file_offsets, &nbytes,
                                     &target_offsets, &user_data) ||
        ring_check_caller(self) < 0) {
        return NULL;
    }
    if (read_arrays_get(self, &arrays, file_offsets, nbytes, target_offsets) == 0 &&
        check_array_reads(self, &arrays, &batch) == 0 &&
        send_file_reads(self, &batch, file, fixed, user_data) == 0) {
        tokens = range_of(batch.first_user_data, batch.count);
    }
    batch_clear(&batch);
    read_arrays_release(&arrays);
    return tokens;
}

PyObject *
ring_submit_reads(Ring *self, PyObject *args, PyObject *kwargs)
{
    return submit_file_reads(self, args, kwargs, false);
}

PyObject *
ring_submit_reads_fixed(Ring *self, PyObject *args, PyObject *kwargs)
{
    return submit_file_reads(self, args, kwargs, true);
}

/* ---- _submit_files ----------------------------------------------------------------------- */

/* Read `index` of the arrays as a batch of its own. -1 with an exception; batch_clear ends it. */
static int
file_batch(Ring *self, struct batch *batch, PyObject *source, const struct read_arrays *arrays,
           size_t index, bool fixed)
{
    batch->commands = batch->few;
    batch->count = 1;
    if (!Py_IS_TYPE(source, self->module->source_type)) {
        PyErr_Format(PyExc_TypeError, "sources[%zu] must be a Source", index);
        return -1;
    }
    batch->source = (Source *)Py_NewRef(source);
    batch->way = way_of(batch->source, fixed);
    return check_array_read(self, arrays, index, batch->few) < 0
               ? -1
               : settle_registered(self, batch, fixed);
}

static int
send_files(Ring *self, PyObject *sources, const struct read_arrays *arrays, bool fixed,
           PyObject *user_data)
{
    const size_t n = (size_t)PyTuple_GET_SIZE(sources);
    if (n != (size_t)arrays->offsets.len / 8) {
        PyErr_Format(PyExc_ValueError, "%zu sources and %zd reads: give one of each", n,
                     arrays->offsets.len / 8);
        return -1;
    }
    struct batch *batches = PyMem_Calloc(n, sizeof(*batches));
    if (batches == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    int failed = 0;
    size_t filled = 0;
    while (filled < n && !failed) {
        failed = file_batch(self, &batches[filled], PyTuple_GET_ITEM(sources, (Py_ssize_t)filled),
                            arrays, filled, fixed);
        filled++;
    }
    if (!failed) {
        failed = send_batches(self, batches, n, user_data);
    }
    while (filled > 0) {
        batch_clear(&batches[--filled]);
    }
    PyMem_Free(batches);
    return failed;
}

/* _submit_files(sources, file_offsets, nbytes, target_offsets, fixed, user_data): one read of each source,
 * none of which is registered, since a file of a dataset is read once. */
PyObject *
ring_submit_files(Ring *self, PyObject *args)
{
    PyObject *sources, *file_offsets, *nbytes, *target_offsets, *user_data;
    struct read_arrays arrays = {0};
    int fixed, failed = -1;
    if (!PyArg_ParseTuple(args, "O!OOOpO:_submit_files", &PyTuple_Type, &sources, &file_offsets,
                          &nbytes, &target_offsets, &fixed, &user_data) ||
        ring_check_caller(self) < 0) {
        return NULL;
    }
    if (read_arrays_get(self, &arrays, file_offsets, nbytes, target_offsets) == 0) {
        failed = send_files(self, sources, &arrays, fixed, user_data);
    }
    read_arrays_release(&arrays);
    if (failed) {
        return NULL;
    }
    Py_RETURN_NONE;
}
