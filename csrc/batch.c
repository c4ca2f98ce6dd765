/*
 * Sends batches of checked commands, as room allows.
 */
#include "batch.h"

#include <errno.h>

#include "reap.h"
#include "sqe.h"

int
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

void
batch_clear(struct batch *batch)
{
    if (batch->commands != batch->few) {
        PyMem_Free(batch->commands);
    }
    Py_XDECREF(batch->source);
}

/* Takes back the commands that the kernel has not consumed, and returns their number. */
static size_t
take_back_locked(Ring *self, struct batch *batches, size_t n)
{
    size_t taken_back = 0;
    struct slot *slot;
    while ((slot = ring_unconsumed_locked(self)) != NULL) {
        for (struct batch *batch = batches; batch < batches + n; batch++) {
            batch->sent -= slot->user_data - batch->first_user_data < batch->count;
        }
        ring_undo_locked(self, slot);
        taken_back++;
    }
    return taken_back;
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
        slot_set_command(&slot, &commands[i]);
        registered += slot.registered != NOT_REGISTERED;
        prepare_locked(self, &target, &slot, inflight_take(&self->table, slot));
        slot.user_data++;
    }
    self->table.holders[batch->holder].flying += (uint32_t)count;
    self->counters[batch->way].submitted += count;
    self->counters[batch->way].registered += registered;
    batch->sent += count;
}

/* Prepares as many commands as there is room for, and returns their number. Batches share the slots, so that
 * a slow drive can't take those that would keep a fast one busy. */
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
        CHAOS_POINT();
        const size_t room = self->table.free_count;
        if (!inflight_reserve(&self->table, left < room ? left : room)) {
            return NO_MEMORY;
        }
        int result = EAGAIN;
        const size_t started = start_batches_locked(self, batches, n);
        if (started > 0) {
            Py_BEGIN_ALLOW_THREADS
            result = ring_enter_locked(self);
            Py_END_ALLOW_THREADS
            left -= started - (result != 0 ? take_back_locked(self, batches, n) : 0);
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

/* Holds the batches' sources while `send_locked` works. */
static int
hold_and_send_locked(Ring *self, struct batch *batches, size_t n, size_t commands)
{
    int result = self->state == RING_OPEN ? DONE : STREAM_CLOSED;
    size_t held = 0;
    while (result == DONE && held < n) {
        CHAOS_POINT();
        struct batch *batch = &batches[held];
        batch->holder = holder_for(&self->table, batch->source, batch->lasting);
        if (batch->holder == NOBODY) {
            result = source_is_closed(batch->source) ? SOURCE_IS_CLOSED : NO_MEMORY;
            break;
        }
        if (batch->lasting) {
            ring_register_file_locked(self, batch->holder);
        }
        held++;
    }
    if (result == DONE) {
        result = send_locked(self, batches, n, commands);
    }
    while (held > 0) {
        const struct batch *batch = &batches[--held];
        if (!batch->lasting) {
            holder_release(&self->table.holders[batch->holder]); /* the kernel has the file */
        }
        holder_drop(&self->table, batch->holder, 1);
    }
    return result;
}

/* Raises the exception for batches of which not all commands were sent. Returns -1. */
static int
raise_unsent(const Ring *self, int result, const struct batch *batches, size_t n)
{
    if (result == SOURCE_IS_CLOSED) {
        const struct batch *closed = batches;
        while (!source_is_closed(closed->source)) {
            closed++;
        }
        gdsdirect_source_raise_closed(closed->source);
    }
    else {
        ring_raise(self, result, "io_uring_enter");
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

int
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
    const int blocked = ring_clear_the_way(self, NO_DEADLINE);
    if (blocked != DONE) {
        return raise_unsent(self, blocked, batches, n);
    }
    ring_lock(self);
    if (self->state == RING_OPEN) {
        ring_forget_closed_locked(self);
    }
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
    return result == DONE ? 0 : raise_unsent(self, result, batches, n);
}

int
send_batch(Ring *self, struct batch *batch, PyObject *user_data)
{
    return send_batches(self, batch, 1, user_data);
}
