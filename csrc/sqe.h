/*
 * An SQE made, and sent. What makes one is inline: it runs once a command.
 */
#ifndef GDSDIRECT_SQE_H
#define GDSDIRECT_SQE_H

#include "ring.h"

#include "nvme_abi.h"

#define SQE_BYTES 128
#define SQE_COMMAND_OFFSET 48 /* struct io_uring_sqe, cmd[]: 80 bytes with IORING_SETUP_SQE128 */

_Static_assert(sizeof(struct nvme_kernel_cmd) <= SQE_BYTES - SQE_COMMAND_OFFSET, "fits the SQE");
_Static_assert(offsetof(struct io_uring_sqe, cmd) == SQE_COMMAND_OFFSET, "cmd");
_Static_assert(IORING_OP_READ_FIXED == 4, "22 is IORING_OP_READ, which ignores buf_index");

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
        .flags = (holder->registered ? IOSQE_FIXED_FILE : 0) |
                 (holder->source->may_block ? IOSQE_ASYNC : 0),
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

/* Sends what is prepared. 0, or a positive errno if the kernel did not take all of it. */
int ring_enter_locked(Ring *self);

/* Takes the last prepared SQE back that the kernel has not consumed, and returns the slot that it is of.
 * NULL: there are none, or a polling thread has them. The kernel reads the queue only inside
 * io_uring_enter, so they are still ours. */
struct slot *ring_unconsumed_locked(Ring *self);

/* The kernel has not seen a command: its slot is free, and it does not count as submitted. */
void ring_undo_locked(Ring *self, struct slot *slot);

/* Sends what the ring needs for itself, `count` times: IORING_OP_NOP to wake the leader,
 * IORING_OP_ASYNC_CANCEL to have everything cancelled. */
void ring_send_own_locked(Ring *self, uint8_t opcode, unsigned count);

/* Whether a command that came back with `res` was sent again.
 *
 * Without the registered buffer: the kernel maps that for NVMe by its pages, all that lie behind the
 * target (6.1, EINVAL) or those of the command (later, ENOMEM), and refuses more than the drive's queue
 * has segments; ordinary memory it maps by runs of pages, far fewer. Longer commands then go that way
 * at once.
 *
 * As it was, after EFAULT, some times: what finds the drive's queue frozen (a reset, a rescan) or full
 * the kernel hands to a worker thread. One that was made while this process returned from an interrupt
 * has no number of a system call in its registers, but -1; the kernel takes it for one of the x32 ABI,
 * and cuts the target's address to 32 bits (nvme_to_user_ptr; seen on 6.1, 6.12 and 7.3), where alias.h
 * has seen to it that nothing is. */
bool ring_resend_locked(Ring *self, struct slot *slot, uint64_t id, int32_t res);

/* Has the kernel hold a source's file, which it then needs not look up and hold for each command. */
void ring_register_file_locked(Ring *self, uint32_t index);

/* Takes the files of closed sources out of the ring's table: the kernel holds each as long as it is
 * there. At the head of calls that submit or reap. */
void ring_forget_closed_locked(Ring *self);

#endif
