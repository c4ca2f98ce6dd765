/*
 * Requests carried out: started, sent as room allows, taken in, given up, finished.
 */
#include "carry.h"

#include <errno.h>
#include <unistd.h>

#include "sqe.h"

#define TURN 16 /* commands of a request that are sent before it is another's turn */

/* ---- Given up ---------------------------------------------------------------------------- */

static inline Ring *
ring_of(const struct request *given_up)
{
    return (Ring *)given_up->ring;
}

/* Says whether any request is in the list. A fork's child empties the list, for it has none of the parent's
 * requests. It makes the lock anew too, since a thread of the parent's may have held it at the fork. */
static bool
has_given_up(struct given_up *given_up)
{
    if (atomic_load(&given_up->count) == 0) {
        return false;
    }
    if (given_up->process != getpid()) {
        pthread_mutex_init(&given_up->lock, NULL);
        given_up->first = NULL;
        atomic_store(&given_up->count, 0);
        return false;
    }
    return true;
}

static void
enlist(struct request *request)
{
    struct given_up *given_up = &ring_of(request)->module->given_up;
    if (!has_given_up(given_up)) {
        given_up->process = getpid();
    }
    pthread_mutex_lock(&given_up->lock);
    request->next_lost = given_up->first;
    given_up->first = request;
    atomic_fetch_add(&given_up->count, 1);
    pthread_mutex_unlock(&given_up->lock);
}

static void
strike_off(struct request *request)
{
    struct given_up *given_up = &ring_of(request)->module->given_up;
    pthread_mutex_lock(&given_up->lock);
    struct request **link = &given_up->first;
    while (*link != request) {
        link = &(*link)->next_lost;
    }
    *link = request->next_lost;
    atomic_fetch_sub(&given_up->count, 1);
    pthread_mutex_unlock(&given_up->lock);
}

static bool
may_write(const struct request *given_up, const Memory *memory)
{
    const Memory *its = ring_of(given_up)->memory;
    return given_up->bounces == NULL && memory->address < its->address + its->nbytes &&
           its->address < memory->address + memory->nbytes;
}

/* The first request that was given up, of `ring` if that isn't NULL, and may write into the memory. */
static struct request *
find_locked(struct given_up *given_up, const Ring *ring, const Memory *memory)
{
    struct request *request = given_up->first;
    while (request != NULL &&
           ((ring != NULL && ring_of(request) != ring) || !may_write(request, memory))) {
        request = request->next_lost;
    }
    return request;
}

Ring *
request_in_the_way(const Ring *self)
{
    struct given_up *given_up = &self->module->given_up;
    if (!has_given_up(given_up)) {
        return NULL;
    }
    pthread_mutex_lock(&given_up->lock);
    const struct request *found = find_locked(given_up, NULL, self->memory);
    /* It has a reference to its ring for as long as it is in the list. */
    Ring *ring = found != NULL ? (Ring *)Py_NewRef(found->ring) : NULL;
    pthread_mutex_unlock(&given_up->lock);
    return ring;
}

bool
request_is_in_the_way_locked(const Ring *self, const Ring *of)
{
    struct given_up *given_up = &self->module->given_up;
    if (!has_given_up(given_up)) {
        return false;
    }
    pthread_mutex_lock(&given_up->lock);
    const bool found = find_locked(given_up, of, self->memory) != NULL;
    pthread_mutex_unlock(&given_up->lock);
    return found;
}

size_t
request_rings_of_given_up(struct module_state *module, Ring **rings, size_t most)
{
    struct given_up *given_up = &module->given_up;
    size_t count = 0;
    if (!has_given_up(given_up)) {
        return 0;
    }
    pthread_mutex_lock(&given_up->lock);
    for (const struct request *each = given_up->first; each != NULL && count < most;
         each = each->next_lost) {
        if (count == 0 || rings[count - 1] != ring_of(each)) {
            rings[count++] = (Ring *)Py_NewRef(each->ring);
        }
    }
    pthread_mutex_unlock(&given_up->lock);
    return count;
}

/* ---- The queue --------------------------------------------------------------------------- */

static void
queue_push_locked(Ring *self, struct request *request)
{
    request->next = NULL;
    request->queued = true;
    if (self->first_queued == NULL) {
        self->first_queued = request;
    }
    else {
        self->last_queued->next = request;
    }
    self->last_queued = request;
}

static struct request *
queue_pop_locked(Ring *self)
{
    struct request *request = self->first_queued;
    self->first_queued = request->next;
    request->queued = false;
    return request;
}

static void
queue_remove_locked(Ring *self, struct request *request)
{
    struct request *before = NULL;
    struct request **link = &self->first_queued;
    while (*link != request) {
        before = *link;
        link = &before->next;
    }
    *link = request->next;
    if (self->last_queued == request) {
        self->last_queued = before;
    }
    request->queued = false;
}

/* ---- The end ----------------------------------------------------------------------------- */

void
request_tell_locked(struct request *request)
{
    if (request->watch != NULL && !request->told) {
        request->told = true;
        request->next = request->watch->finished;
        request->watch->finished = request;
        watch_tell(request->watch);
    }
}

static void
finish_locked(Ring *self, struct request *request)
{
    for (size_t i = 0; i < request->source_count; i++) {
        holder_drop(&self->table, request->holders[i], 1);
    }
    self->requests--;
    CHAOS_POINT();
    ring_wake_locked(self, request);
    if (request->given_up && request->ring != NULL) {
        strike_off(request);
        request->ring = NULL;
        self->unowned++;
        CHAOS_POINT();
        ring_wake_locked(self, NULL);
        ring_tell_watches_locked(self);
    }
    if (request->lent != NULL) {
        gdsdirect_memory_release(request->lent);
    }
    request_tell_locked(request);
    if (!request->owned) {
        request->next = self->to_free;
        self->to_free = request;
    }
}

/* The request sends no more commands. It finishes here if none is in flight. */
static void
cut_off_locked(Ring *self, struct request *request)
{
    if (request->queued) {
        queue_remove_locked(self, request);
    }
    CHAOS_POINT();
    request->left -= request->count - request->sent;
    request->count = request->sent;
    if (request->left == 0) {
        finish_locked(self, request);
    }
}

static void
fail_locked(Ring *self, struct request *request, int error)
{
    request->error = error;
    cut_off_locked(self, request);
}

void
request_give_up_locked(Ring *self, struct request *request)
{
    if (request->given_up || (request->started && request->left == 0)) {
        return;
    }
    request->given_up = true;
    if (!request->started) {
        request->started = true;
        request->count = request->left = 0;
        return;
    }
    CHAOS_POINT();
    cut_off_locked(self, request);
    if (request->left > 0) {
        request->ring = Py_NewRef((PyObject *)self);
        enlist(request);
    }
}

void
request_adopt_locked(Ring *self)
{
    struct request *request = &self->remnant;
    if (self->requests > 0 || inflight_count(&self->table) == 0) {
        return; /* it was left before */
    }
    *request = (struct request){
        .started = true,
        .owned = true,
        .first_short = NO_COMMAND,
    };
    for (uint32_t i = 0; i < self->table.depth; i++) {
        struct slot *slot = &self->table.slots[i];
        if (slot_is_taken(slot)) {
            slot->request = request;
            request->left++;
        }
    }
    request->count = request->sent = request->left;
    self->requests++;
    request_give_up_locked(self, request);
}

/* ---- Sending ----------------------------------------------------------------------------- */

int
request_start_locked(Ring *self, struct request *request)
{
    if (self->state != RING_OPEN ||
        (request->lent != NULL && !gdsdirect_memory_acquire(request->lent))) {
        return STREAM_CLOSED;
    }
    for (size_t i = 0; i < request->source_count; i++) {
        request->holders[i] = holder_for(&self->table, request->sources[i], false);
        if (request->holders[i] == NOBODY) {
            const bool closed = source_is_closed(request->sources[i]);
            while (i > 0) {
                holder_drop(&self->table, request->holders[--i], 1);
            }
            if (request->lent != NULL) {
                gdsdirect_memory_release(request->lent);
            }
            return closed ? SOURCE_IS_CLOSED : NO_MEMORY;
        }
    }
    CHAOS_POINT();
    request->started = true;
    self->requests++;
    if (request->left > 0) {
        queue_push_locked(self, request);
    }
    else {
        finish_locked(self, request);
    }
    return DONE;
}

/* Registers the memory of bounce slots. Returns the index of the registered buffer, or NOT_REGISTERED. */
static uint16_t
register_bounce_locked(Ring *self)
{
    const Py_buffer *memory = &self->bounce.export;
    const struct iovec piece = {.iov_base = memory->buf, .iov_len = (size_t)memory->len};
    const int result =
        self->registered > 0
            ? io_uring_register_buffers_update_tag(&self->ring, self->registered, &piece, NULL, 1)
            : io_uring_register_buffers(&self->ring, &piece, 1);
    return result >= 0 ? (uint16_t)self->registered : NOT_REGISTERED;
}

void
request_lend_bounce_locked(Ring *self, Memory **memory, Py_buffer *export)
{
    struct bounce_memory *bounce = &self->bounce;
    if (bounce->memory != NULL) {
        return;
    }
    bounce->memory = *memory;
    bounce->export = *export;
    *memory = NULL;
    *export = (Py_buffer){0};
    bounce->registered = register_bounce_locked(self);
    while (bounce->free_count < BOUNCE_SLOTS) {
        bounce->free[bounce->free_count] = bounce->free_count;
        bounce->free_count++;
    }
}

/* Takes a bounce slot for the command that `slot` is of. */
static void
take_bounce_locked(Ring *self, struct request *request, struct slot *slot)
{
    const uint8_t place = self->bounce.free[--self->bounce.free_count];
    request->bounces[slot->user_data].slot = place;
    slot->address = (uintptr_t)self->bounce.memory->address + place * (size_t)BOUNCE_SLOT_BYTES;
    if (slot->registered != NOT_REGISTERED) {
        slot->registered = self->bounce.registered;
    }
}

/* Takes slots and SQEs for the next `count` commands of a request. */
static void
prepare_some_locked(Ring *self, struct request *request, size_t count)
{
    struct slot slot = {.request = request, .way = (uint8_t)request->way};
    struct target target = target_of(self, request->holders[0]);
    uint64_t registered = 0;
    for (size_t i = request->sent; i < request->sent + count; i++) {
        slot.user_data = i;
        slot.holder = request->holders[request->source_count > 1 ? i : 0];
        slot_set_command(&slot, &request->commands[i]);
        if (request->source_count > 1) {
            target = target_of(self, slot.holder);
        }
        if (request->bounces != NULL) {
            take_bounce_locked(self, request, &slot);
        }
        registered += slot.registered != NOT_REGISTERED;
        prepare_locked(self, &target, &slot, inflight_take(&self->table, slot));
        self->table.holders[slot.holder].flying++;
    }
    request->sent += count;
    self->counters[request->way].submitted += count;
    self->counters[request->way].registered += registered;
}

/* Prepares commands as far as there is room, and returns whether it prepared any. It looks at each request
 * once: a request that waits for a bounce slot stays in the queue, and does not hold up the others. */
static bool
prepare_round_locked(Ring *self)
{
    struct request *last = self->last_queued;
    bool prepared = false, more = self->first_queued != NULL;
    while (more && self->table.free_count > 0) {
        struct request *request = queue_pop_locked(self);
        more = request != last;
        size_t count = request->count - request->sent;
        if (self->first_queued != NULL && count > TURN) {
            count = TURN;
        }
        if (count > self->table.free_count) {
            count = self->table.free_count;
        }
        if (request->bounces != NULL && count > self->bounce.free_count) {
            count = self->bounce.free_count;
        }
        if (count > 0) {
            prepare_some_locked(self, request, count);
            prepared = true;
        }
        if (request->sent < request->count) {
            queue_push_locked(self, request);
        }
    }
    return prepared;
}

static void
give_back_bounce_locked(Ring *self, const struct request *request, size_t index)
{
    self->bounce.free[self->bounce.free_count++] = (uint8_t)request->bounces[index].slot;
}

/* Puts a command that the kernel has not consumed back into its request, to be sent later. It is the last
 * one that the request sent, since commands are taken back from the queue's end. */
static void
take_back_locked(Ring *self, struct slot *slot)
{
    struct request *request = slot->request;
    request->sent--;
    if (request->bounces != NULL) {
        give_back_bounce_locked(self, request, request->sent);
    }
    if (!request->queued) {
        queue_push_locked(self, request);
    }
    ring_undo_locked(self, slot);
}

void
request_pump_locked(Ring *self)
{
    int result = 0;
    bool prepared = false;
    while (self->first_queued != NULL && self->table.free_count > 0 && prepare_round_locked(self)) {
        prepared = true;
    }
    if (prepared) {
        CHAOS_POINT();
        result = ring_enter_locked(self);
    }
    if (result == 0) {
        return;
    }
    struct slot *slot;
    while ((slot = ring_unconsumed_locked(self)) != NULL) {
        CHAOS_POINT();
        take_back_locked(self, slot);
    }
    /* The kernel has no memory now. A completion gives some back, and pumps again. */
    if ((result == EAGAIN || result == EBUSY) && inflight_count(&self->table) > 0) {
        return;
    }
    while (self->first_queued != NULL) {
        fail_locked(self, self->first_queued, result);
    }
}

/* ---- Coming back ------------------------------------------------------------------------- */

/* Copies the wanted part of an aligned read to its place. */
static void
copy_wanted_locked(Ring *self, const struct request *request, const struct slot *slot,
                   uint32_t nbytes)
{
    const struct bounce *bounce = &request->bounces[slot->user_data];
    if (nbytes > bounce->skip && !request->given_up) {
        const uint32_t there = nbytes - bounce->skip;
        memcpy((void *)(uintptr_t)request->commands[slot->user_data].address,
               (const char *)(uintptr_t)slot->address + bounce->skip,
               there < bounce->wanted ? there : bounce->wanted);
    }
    give_back_bounce_locked(self, request, slot->user_data);
}

void
request_land_locked(Ring *self, struct slot *slot, int32_t res)
{
    struct request *request = slot->request;
    const uint32_t expected = slot->nbytes;
    const uint32_t nbytes = bytes_of_result(slot, res);

    counters_land(&self->counters[slot->way], nbytes, expected);
    CHAOS_POINT();
    if (request->bounces != NULL) {
        copy_wanted_locked(self, request, slot, nbytes);
    }
    if (nbytes != expected && request->commands != NULL) {
        request_note_short(request, slot->user_data, res, nbytes);
    }
    slot_free(&self->table, slot);
    self->table.holders[slot->holder].flying--;
    holder_drop(&self->table, slot->holder, 0); /* of a remnant it may be the last that needs it */
    if (--request->left == 0) {
        finish_locked(self, request);
    }
}
