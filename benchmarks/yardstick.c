/*
 * What the same work costs in C: liburing, one thread, one loop, nothing checked. A shared library, so
 * that a benchmark can run it in the same process and moment as what it is compared with.
 *
 * It does what a careful C programmer does for speed: the files, the buffer and the ring's descriptor
 * are registered, and one system call submits all that is prepared and waits for a batch. Nothing here
 * is shared with csrc/, so that a flaw there can't be in both.
 */
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <linux/nvme_ioctl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

#define NVME_READ 0x02
#define MOST_FILES 2

struct yardstick {
    struct io_uring ring;
    int fds[MOST_FILES];
    unsigned files;
};

/* What there is to read. Piece i goes to file i modulo the number of files. */
struct work {
    const uint64_t *positions; /* first block, or offset in the file in bytes */
    const uint64_t *addresses; /* where to, inside the registered buffer */
    uint64_t n;                /* a multiple of batch */
    uint32_t nbytes;           /* of each piece */
    uint32_t blocks;           /* the same in blocks; 0: the files are no namespaces */
    uint32_t nsids[MOST_FILES];
    uint32_t depth; /* pieces in flight at most */
    uint32_t batch; /* pieces submitted at once, and waited for at least */
};

/* As COMPLETION_FORMAT in gdsdirect/stream.py. */
struct record {
    uint64_t user_data;
    int32_t res;
    uint32_t nbytes;
};

/* The package's own 64-byte read command: see csrc/nvme_abi.h, which asserts the layout. */
struct wire {
    uint8_t opcode;
    uint8_t zero_1[3];
    uint32_t nsid;
    uint64_t zero_8[3];
    uint64_t address;
    uint64_t lba;
    uint32_t last_block;
    uint32_t zero_52[3];
};
_Static_assert(sizeof(struct wire) == 64, "the wire format has 64 bytes");

EXPORT void
yardstick_close(struct yardstick *self)
{
    if (self->ring.ring_fd >= 0) {
        io_uring_queue_exit(&self->ring);
    }
    for (unsigned i = 0; i < self->files; i++) {
        close(self->fds[i]);
    }
    free(self);
}

/* A ring of `entries` on one file or, with `second`, two; the buffer is registered. NULL: errno says
 * why not. */
EXPORT struct yardstick *
yardstick_open(const char *path, const char *second, int open_flags, unsigned entries,
               unsigned setup_flags, void *buffer, size_t nbytes)
{
    const char *paths[MOST_FILES] = {path, second};
    const struct iovec memory = {buffer, nbytes};
    struct io_uring_params params = {
        .flags = setup_flags | IORING_SETUP_SQE128 | IORING_SETUP_CQE32 | IORING_SETUP_SUBMIT_ALL,
    };
    struct yardstick *self = calloc(1, sizeof(*self));
    if (self == NULL) {
        return NULL;
    }
    self->ring.ring_fd = -1;
    int failed = 0;
    for (unsigned i = 0; i < MOST_FILES && paths[i] != NULL && failed == 0; i++) {
        self->fds[i] = open(paths[i], open_flags | O_CLOEXEC);
        failed = self->fds[i] < 0 ? -errno : 0;
        self->files += failed == 0;
    }
    if (failed == 0) {
        failed = io_uring_queue_init_params(entries, &self->ring, &params);
        if (failed < 0) {
            self->ring.ring_fd = -1; /* nothing to exit from */
        }
    }
    if (failed == 0) {
        const int registered = io_uring_register_ring_fd(&self->ring);
        failed = registered < 0 ? registered : 0;
    }
    if (failed == 0) {
        failed = io_uring_register_files(&self->ring, self->fds, self->files);
    }
    if (failed == 0) {
        failed = io_uring_register_buffers(&self->ring, &memory, 1);
    }
    if (failed != 0) {
        yardstick_close(self);
        errno = -failed;
        return NULL;
    }
    return self;
}

static inline void
prepare(struct io_uring_sqe *sqe, const struct work *work, uint64_t index, unsigned file)
{
    const uint64_t position = work->positions[index];
    memset(sqe, 0, 2 * sizeof(*sqe)); /* SQE128: two entries' room */
    if (work->blocks != 0) {
        struct nvme_uring_cmd *command = (struct nvme_uring_cmd *)sqe->cmd;
        sqe->opcode = IORING_OP_URING_CMD;
        sqe->cmd_op = NVME_URING_CMD_IO;
        sqe->rw_flags = IORING_URING_CMD_FIXED; /* the same word as uring_cmd_flags */
        command->opcode = NVME_READ;
        command->nsid = work->nsids[file];
        command->addr = work->addresses[index];
        command->data_len = work->nbytes;
        command->cdw10 = (uint32_t)position;
        command->cdw11 = (uint32_t)(position >> 32);
        command->cdw12 = work->blocks - 1;
    }
    else {
        sqe->opcode = IORING_OP_READ_FIXED;
        sqe->off = position;
        sqe->addr = work->addresses[index];
        sqe->len = work->nbytes;
    }
    sqe->fd = (int)file;
    sqe->flags = IOSQE_FIXED_FILE;
    sqe->user_data = index;
}

/* Empties the completion ring into `records`. Returns how many there were, and counts failures. */
static inline uint64_t
reap(struct io_uring *ring, const struct work *work, struct record *records, uint64_t *failures)
{
    struct io_uring_cqe *cqe;
    unsigned head, seen = 0;
    io_uring_for_each_cqe(ring, head, cqe) {
        /* A command says 0 for success; a read says how many bytes. */
        const uint32_t nbytes = work->blocks != 0 ? (cqe->res == 0 ? work->nbytes : 0)
                                                  : (cqe->res > 0 ? (uint32_t)cqe->res : 0);
        records[seen++] = (struct record){cqe->user_data, cqe->res, nbytes};
        *failures += nbytes != work->nbytes;
    }
    io_uring_cq_advance(ring, seen);
    return seen;
}

/* Does all of `work`; `records`, with room for `depth`, holds what was reaped last. Returns how many
 * pieces failed, or -errno when the ring itself did. */
EXPORT int64_t
yardstick_run(struct yardstick *self, const struct work *work, struct record *records)
{
    const uint64_t n = work->n;
    uint64_t sent = 0, done = 0, failures = 0;
    unsigned file = 0;
    while (done < n) {
        while (sent < n && sent - done + work->batch <= work->depth) {
            for (uint32_t i = 0; i < work->batch; i++) {
                prepare(io_uring_get_sqe(&self->ring), work, sent++, file);
                file = file + 1 < self->files ? file + 1 : 0;
            }
        }
        const uint64_t flying = sent - done;
        const unsigned least = flying < work->batch ? (unsigned)flying : work->batch;
        int result = io_uring_submit_and_wait(&self->ring, least);
        if (result < 0 && result != -EINTR) {
            return result;
        }
        done += reap(&self->ring, work, records, &failures);
    }
    return (int64_t)failures;
}

/* Packs commands for all of `work` to the first file. */
EXPORT void
yardstick_pack(const struct work *work, struct wire *out)
{
    const uint64_t *lbas = work->positions, *addresses = work->addresses;
    const uint64_t n = work->n;
    const uint32_t nsid = work->nsids[0], last_block = work->blocks - 1;
    for (uint64_t i = 0; i < n; i++) {
        out[i] = (struct wire){
            .opcode = NVME_READ,
            .nsid = nsid,
            .address = addresses[i],
            .lba = lbas[i],
            .last_block = last_block,
        };
    }
}
