/*
 * Every bound that a command is held to, before the kernel sees it.
 */
#include "check.h"

#include <stdio.h>

#include "arrays.h"
#include "nvme_abi.h"

#define REGISTERED_SHIFT 30            /* a registered buffer has at most 1 GiB (io_uring/rsrc.c) */
#define MOST_BYTES INT64_C(0x7FFFF000) /* of one read: MAX_RW_COUNT, include/linux/fs.h */

/* The registered buffer that holds all of the range, or NOT_REGISTERED. */
static inline uint16_t
registered_buffer(uint32_t registered, uint64_t offset, uint32_t nbytes)
{
    const uint64_t first = offset >> REGISTERED_SHIFT;
    const uint64_t last = (offset + nbytes - 1) >> REGISTERED_SHIFT;
    return first == last && first < registered ? (uint16_t)first : NOT_REGISTERED;
}

uint16_t
check_registered(const Ring *self, uint64_t offset, uint32_t nbytes)
{
    return registered_buffer(self->registered, offset, nbytes);
}

/* ---- Commands of NVMe -------------------------------------------------------------------- */

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
                     index, address, (unsigned long long)nbytes, self->memory->nbytes,
                     self->memory->address);
    }
    return -1;
}

/* A command as it is sent. False: `read` breaks a rule, or `wrong` says what is. */
static inline bool
check_bounds(const struct bounds *bounds, const struct nvme_read *read, struct command *command,
             const char **wrong)
{
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

/* 64 bytes of the caller's, as a command that may be sent. False: as above. */
static inline bool
check_command(const struct bounds *bounds, const unsigned char *wire, struct command *command,
              struct nvme_read *read, const char **wrong)
{
    *wrong = wire_decode(wire, read);
    return *wrong == NULL && check_bounds(bounds, read, command, wrong);
}

static struct bounds
bounds_of(const Ring *self, const Source *source)
{
    const uint32_t most = self->registered_most;
    const Memory *memory = self->memory;
    return (struct bounds){
        .start = (uintptr_t)self->memory->address,
        .room = (uint64_t)self->memory->nbytes,
        .capacity = source->capacity,
        .nsid = source->nsid,
        .lba_shift = source->lba_shift,
        .max_transfer = source->max_transfer,
        .registered = self->registered,
        /* What it can't map of a registered buffer Linux 6.12 copies, and says nothing: its own pages
         * are then the drive's target (blk_rq_map_user_iov). Unregistered memory it maps or refuses. */
        .most_registered = most < source->safe_transfer ? most : source->safe_transfer,
        .exposed = memory->exposed ? &self->module->aliases : NULL,
    };
}

/* -1 with ValueError for a namespace that can't be read. */
static int
check_format(const Source *source)
{
    if (source->metadata_size == 0) {
        return 0;
    }
    PyErr_Format(PyExc_ValueError,
                 "%S is formatted with %u bytes of metadata a block, which gdsdirect does not "
                 "transfer: use a namespace formatted without",
                 source->path, source->metadata_size);
    return -1;
}

int
check_commands(const Ring *self, struct batch *batch, const Py_buffer *wire)
{
    if (wire->len % WIRE_BYTES != 0) {
        PyErr_Format(PyExc_ValueError, "commands has %zd bytes, not a multiple of 64", wire->len);
        return -1;
    }
    if (check_format(batch->source) < 0 ||
        batch_allocate(batch, (size_t)wire->len / WIRE_BYTES) < 0) {
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

/* ---- Reads of files ---------------------------------------------------------------------- */

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
    return self->memory->nbytes < MOST_BYTES ? self->memory->nbytes : MOST_BYTES;
}

int
check_file_read(const Ring *self, struct command *command, PyObject *file_offset, PyObject *nbytes,
                PyObject *target_offset)
{
    int64_t position, length, target;
    const int64_t room = self->memory->nbytes;
    if (in_range(nbytes, "nbytes", 1, most_bytes(self), &length) < 0 ||
        in_range(target_offset, "target_offset", 0, room - length, &target) < 0 ||
        in_range(file_offset, "file_offset", 0, INT64_MAX - length, &position) < 0) {
        return -1;
    }
    command->position = (uint64_t)position;
    command->address = (uintptr_t)self->memory->address + (uint64_t)target;
    command->nbytes = (uint32_t)length;
    command->registered = registered_buffer(self->registered, (uint64_t)target, (uint32_t)length);
    return 0;
}

void
read_arrays_release(struct read_arrays *arrays)
{
    PyBuffer_Release(&arrays->offsets);
    PyBuffer_Release(&arrays->sizes);
    PyBuffer_Release(&arrays->targets);
}

int
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

/* Read `index` of the arrays, fetched once: other threads may change them. */
static inline struct command
fetch_read(const struct read_arrays *arrays, size_t index, uint64_t *target)
{
    struct command command = {.nbytes = arrays->one_size, .registered = NOT_REGISTERED};
    memcpy(&command.position, (const char *)arrays->offsets.buf + index * 8, 8);
    memcpy(target, (const char *)arrays->targets.buf + index * 8, 8);
    if (arrays->has_sizes) {
        memcpy(&command.nbytes, (const char *)arrays->sizes.buf + index * 4, 4);
    }
    return command;
}

/* ValueError for a read that may not be sent. Returns -1. */
static int
refuse_read(const Ring *self, size_t index, const struct command *command, uint64_t target)
{
    PyErr_Format(PyExc_ValueError,
                 "read %zu: file_offset is %llu, nbytes %u, target_offset %llu: the buffer has "
                 "%lld bytes, a read at most %lld, and a file ends before 2**63",
                 index, (unsigned long long)command->position, command->nbytes,
                 (unsigned long long)target, (long long)self->memory->nbytes,
                 (long long)most_bytes(self));
    return -1;
}

/* Makes a command of read `index` of the arrays. If it may not be sent, returns -1 with ValueError. */
static int
check_array_read(const Ring *self, const struct read_arrays *arrays, size_t index,
                 struct command *command)
{
    const uint64_t room = (uint64_t)self->memory->nbytes;
    uint64_t target;
    *command = fetch_read(arrays, index, &target);
    const uint32_t nbytes = command->nbytes;
    if (nbytes < 1 || nbytes > most_bytes(self) || target > room - nbytes ||
        command->position > (uint64_t)INT64_MAX - nbytes) {
        return refuse_read(self, index, command, target);
    }
    command->address = (uintptr_t)self->memory->address + target;
    command->registered = registered_buffer(self->registered, target, nbytes);
    return 0;
}

int
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

/* ---- Requests ---------------------------------------------------------------------------- */

/* A read of whole blocks of a namespace, told in bytes: `target` is its place in the memory that the
 * bounds are of. -1 with ValueError. */
static int
check_blocks(const Ring *self, const struct bounds *bounds, const Source *source, size_t index,
             struct command *command, uint64_t target)
{
    const uint64_t block = UINT64_C(1) << bounds->lba_shift;
    const char *wrong = NULL;
    const struct nvme_read read = {
        .lba = command->position >> bounds->lba_shift,
        .address = bounds->start + target,
        .nsid = bounds->nsid,
        .blocks = command->nbytes >> bounds->lba_shift,
    };
    if ((command->position | command->nbytes) & (block - 1) || read.blocks < 1 ||
        read.blocks > NVME_MAX_BLOCKS) {
        PyErr_Format(PyExc_ValueError,
                     "read %zu: %u bytes at offset %llu of %S are not 1 to 65536 whole blocks of "
                     "%llu bytes",
                     index, command->nbytes, (unsigned long long)command->position, source->path,
                     (unsigned long long)block);
        return -1;
    }
    if (!check_bounds(bounds, &read, command, &wrong)) {
        return wrong != NULL ? (PyErr_Format(PyExc_ValueError, "read %zu: %s", index, wrong), -1)
                             : refuse(self, source, (Py_ssize_t)index, &read);
    }
    return 0;
}

/* Read `index` into its place. */
static int
check_placed(const Ring *self, const struct bounds *bounds, struct request *request,
             const struct read_arrays *arrays, size_t index, bool fixed)
{
    struct command *command = &request->commands[index];
    if (bounds != NULL) {
        uint64_t target;
        *command = fetch_read(arrays, index, &target);
        return check_blocks(self, bounds, request->sources[0], index, command, target);
    }
    if (check_array_read(self, arrays, index, command) < 0) {
        return -1;
    }
    if (!fixed) {
        command->registered = NOT_REGISTERED;
    }
    else if (command->registered == NOT_REGISTERED) {
        PyErr_Format(PyExc_ValueError, "read %zu doesn't fall into one registered buffer", index);
        return -1;
    }
    return 0;
}

/* Read `index` into a bounce slot, of which `wanted` bytes go to its place. */
static int
check_bounced(const Ring *self, const struct bounds *bounds, struct request *request,
              const struct read_arrays *arrays, const struct wanted_arrays *wanted, size_t index,
              bool fixed)
{
    const uint64_t room = (uint64_t)self->memory->nbytes;
    struct command *command = &request->commands[index];
    struct bounce *bounce = &request->bounces[index];
    uint64_t target;
    *command = fetch_read(arrays, index, &target);
    memcpy(&bounce->skip, (const char *)wanted->skips.buf + index * 4, 4);
    memcpy(&bounce->wanted, (const char *)wanted->sizes.buf + index * 4, 4);
    const uint32_t nbytes = command->nbytes;
    if (nbytes < 1 || nbytes > BOUNCE_SLOT_BYTES || bounce->skip > nbytes ||
        bounce->wanted > nbytes - bounce->skip || bounce->wanted > room ||
        target > room - bounce->wanted || command->position > (uint64_t)INT64_MAX - nbytes) {
        return refuse_read(self, index, command, target);
    }
    if (bounds != NULL) {
        if (check_blocks(self, bounds, request->sources[0], index, command, 0) < 0) {
            return -1;
        }
    }
    else {
        command->registered = fixed ? 0 : NOT_REGISTERED; /* which one, take_bounce_locked says */
    }
    command->address = (uintptr_t)self->memory->address + target;
    return 0;
}

/* Those of bounce slots: what goes into the whole of one is in the bounds. */
static struct bounds
bounds_of_bounce(const Ring *self, const Source *source)
{
    struct bounds bounds = bounds_of(self, source);
    const Memory *memory = self->bounce.memory;
    bounds.start = (uintptr_t)memory->address;
    bounds.room = BOUNCE_SLOT_BYTES;
    bounds.registered = self->bounce.registered != NOT_REGISTERED;
    bounds.exposed = memory->exposed ? &self->module->aliases : NULL;
    return bounds;
}

int
check_request(const Ring *self, struct request *request, const struct read_arrays *arrays,
              const struct wanted_arrays *wanted, bool fixed)
{
    struct bounds bounds;
    const Source *source = request->source_count > 0 ? request->sources[0] : NULL;
    const bool is_nvme = source != NULL && source->is_nvme;
    if (is_nvme) {
        if (check_format(source) < 0) {
            return -1;
        }
        bounds = wanted == NULL ? bounds_of(self, source) : bounds_of_bounce(self, source);
    }
    for (size_t i = 0; i < request->count; i++) {
        const int failed =
            wanted == NULL
                ? check_placed(self, is_nvme ? &bounds : NULL, request, arrays, i, fixed)
                : check_bounced(self, is_nvme ? &bounds : NULL, request, arrays, wanted, i, fixed);
        if (failed) {
            return -1;
        }
    }
    return 0;
}
