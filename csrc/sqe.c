/*
 * SQEs sent, and sent again; the files that they name, registered.
 */
#include "sqe.h"

#include <errno.h>

#define MOST_FAULTS 20

/* ---- Sending ----------------------------------------------------------------------------- */

int
ring_enter_locked(Ring *self)
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

struct slot *
ring_unconsumed_locked(Ring *self)
{
    struct io_uring_sq *sq = &self->ring.sq;
    struct slot *slot = NULL;
    if (self->setup_flags & IORING_SETUP_SQPOLL) {
        return NULL;
    }
    const unsigned head = io_uring_smp_load_acquire(sq->khead);
    while (slot == NULL && sq->sqe_tail != head) {
        const unsigned last = sq->sqe_tail - 1;
        slot = inflight_find(&self->table, sq->sqes[(size_t)(last & sq->ring_mask) * 2].user_data);
        sq->sqe_head = sq->sqe_tail = last;
        io_uring_smp_store_release(sq->ktail, last);
    }
    return slot;
}

void
ring_undo_locked(Ring *self, struct slot *slot)
{
    self->counters[slot->way].submitted--;
    self->counters[slot->way].registered -= slot->registered != NOT_REGISTERED;
    inflight_undo(&self->table, slot);
}

/* ring_enter_locked, until the kernel has memory for it. */
static void
enter_at_last_locked(Ring *self)
{
    while (ring_enter_locked(self) == EAGAIN) {
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
    const bool bounced = slot->request != NULL && slot->request->bounces != NULL;
    const Memory *memory = bounced ? self->bounce.memory : self->memory;
    return !memory->exposed || alias_is_held(&self->module->aliases, slot->address, slot->nbytes);
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

/* ---- Registered files -------------------------------------------------------------------- */

void
ring_register_file_locked(Ring *self, uint32_t index)
{
    struct holder *holder = &self->table.holders[index];
    if (holder->registered || !self->registers_files || index >= REGISTERED_FILES) {
        return;
    }
    const int fd = holder->source->fd;
    CHAOS_POINT();
    if (io_uring_register_files_update(&self->ring, index, &fd, 1) == 1) {
        CHAOS_POINT();
        holder->registered = true;
        holder_release(holder); /* it may be closed: the kernel has the file */
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
