/*
 * The table of commands in flight: who owns which source until when.
 *
 * A command takes a slot before the kernel sees it, and gives it back when its CQE was consumed. If it
 * belongs to a request, the request takes in what became of it. Else the outcome waits in a queue until
 * the caller takes it. The source that it reads from is held from the slot's first moment until the
 * outcome was handed out, since an error's text needs it. The memory needs no entry here: a ring has
 * one, and holds it as long as any slot is taken.
 *
 * `user_data` in the SQE is a slot and its generation, never a pointer: a CQE that came twice, or
 * from nowhere, finds a generation that doesn't match and touches nothing.
 *
 * Nothing here runs Python code, so all of it may be called under the ring's lock. Room for outcomes
 * is reserved before a command is sent: consuming a CQE can't fail.
 */
#ifndef GDSDIRECT_INFLIGHT_H
#define GDSDIRECT_INFLIGHT_H

#include "module.h"

#include <stdlib.h>

/* The way that a command goes; the order of the counters that Python reads. */
enum way { WAY_PASSTHROUGH, WAY_FILE_DIRECT, WAY_FILE_FIXED, WAY_BUFFERED, WAYS };

/* The way of reads of a source, `fixed` into registered memory. Without O_DIRECT the page cache copies,
 * whatever the opcode. */
static inline enum way
way_of(const Source *source, bool fixed)
{
    if (source->is_nvme) {
        return WAY_PASSTHROUGH;
    }
    return !source->is_direct ? WAY_BUFFERED : fixed ? WAY_FILE_FIXED : WAY_FILE_DIRECT;
}

#define NOT_REGISTERED UINT16_MAX

/* A ring's table of registered files. Sources beyond so many are read by their descriptors. */
#define REGISTERED_FILES 64

/* A checked command. Copied out of the caller's memory, which other threads may change between the
 * check and the last command's turn. */
struct command {
    uint64_t position; /* first LBA, or offset in the file */
    uint64_t address;
    uint32_t nbytes;
    uint16_t registered; /* the registered buffer that it falls into, or NOT_REGISTERED */
};

struct request;

/* A command that the kernel has, and all that its SQE is made of. */
struct slot {
    struct request *request; /* that it is of; NULL: its completion is the caller's to take */
    uint64_t user_data;      /* of a request: the command's index there */
    uint64_t position;       /* first LBA, or offset in the file */
    uint64_t address;
    uint32_t nbytes; /* asked for */
    uint32_t generation;
    uint32_t holder;
    uint8_t way;
    uint8_t faults;      /* times that it came back with EFAULT and was sent again */
    uint16_t registered; /* the registered buffer that it goes into, or NOT_REGISTERED */
};

/* What became of a command, until the caller takes it. */
struct outcome {
    uint64_t user_data;
    uint64_t position;
    uint32_t expected;
    uint32_t nbytes; /* in the buffer */
    int32_t res;     /* the kernel's, as it is */
    uint32_t holder;
    uint32_t way;
};

/* A source, held as long as it has commands, and its descriptor with it. Where the file is in the
 * ring's table of registered files, at the holder's own index, the kernel holds it and not the
 * descriptor, and the holder is kept for the next batch. */
struct holder {
    Source *source;   /* a strong reference */
    uint32_t flying;  /* commands that the kernel has */
    uint32_t waiting; /* outcomes, requests, and batches that are being sent */
    uint32_t next;    /* in the list of free holders, or of those to let go */
    bool acquired;    /* the descriptor is held open */
    bool registered;  /* the ring's table of files holds the file, at this index */
};

#define NOBODY UINT32_MAX

struct inflight {
    struct slot *slots;
    uint32_t *free_slots; /* a stack */
    uint32_t depth;
    uint32_t free_count;

    struct holder *holders;
    uint32_t holders_allocated;
    uint32_t free_holder;
    uint32_t finished_holder; /* nothing needs it: Python code lets go of it, without the lock */
    uint32_t last_holder;     /* of the last lasting source: the next one is probably the same */

    struct outcome *outcomes; /* a ring buffer of a power of two */
    size_t outcomes_allocated;
    size_t first;
    size_t ready;
    size_t on_the_way; /* taken by a caller, and not in Python's hands yet: may come back */
};

/* A table that has nothing, not even slots. */
#define INFLIGHT_EMPTY \
    ((struct inflight){.free_holder = NOBODY, .finished_holder = NOBODY, .last_holder = NOBODY})

static inline uint32_t
inflight_count(const struct inflight *table)
{
    return table->depth - table->free_count;
}

static inline bool
inflight_init(struct inflight *table, uint32_t depth)
{
    table->slots = calloc(depth, sizeof(*table->slots));
    table->free_slots = calloc(depth, sizeof(*table->free_slots));
    table->depth = table->free_count = depth;
    if (table->slots == NULL || table->free_slots == NULL) {
        return false;
    }
    for (uint32_t i = 0; i < depth; i++) {
        table->free_slots[i] = depth - 1 - i;
    }
    return true;
}

static inline void
inflight_destroy(struct inflight *table)
{
    free(table->slots);
    free(table->free_slots);
    free(table->holders);
    free(table->outcomes);
}

/* ---- Outcomes ---------------------------------------------------------------------------- */

static inline struct outcome *
outcome_at(struct inflight *table, size_t index)
{
    return &table->outcomes[(table->first + index) & (table->outcomes_allocated - 1)];
}

/* Room for the outcomes of `more` commands beside all those that are out. */
static inline bool
inflight_reserve(struct inflight *table, size_t more)
{
    size_t needed = table->ready + table->on_the_way + inflight_count(table) + more;
    if (needed <= table->outcomes_allocated) {
        return true;
    }
    size_t allocated = table->outcomes_allocated ? table->outcomes_allocated : 64;
    while (allocated < needed) {
        allocated *= 2;
    }
    struct outcome *outcomes = malloc(allocated * sizeof(*outcomes));
    if (outcomes == NULL) {
        return false;
    }
    for (size_t i = 0; i < table->ready; i++) {
        outcomes[i] = *outcome_at(table, i);
    }
    free(table->outcomes);
    table->outcomes = outcomes;
    table->outcomes_allocated = allocated;
    table->first = 0;
    return true;
}

/* ---- Holders ----------------------------------------------------------------------------- */

static inline bool
holders_grow(struct inflight *table)
{
    uint32_t allocated = table->holders_allocated ? table->holders_allocated * 2 : 8;
    struct holder *holders = realloc(table->holders, allocated * sizeof(*holders));
    if (holders == NULL) {
        return false;
    }
    for (uint32_t i = table->holders_allocated; i < allocated; i++) {
        holders[i] = (struct holder){.next = table->free_holder};
        table->free_holder = i;
    }
    table->holders = holders;
    table->holders_allocated = allocated;
    return true;
}

static inline bool
holder_is_busy(const struct holder *holder)
{
    return holder->flying + holder->waiting > 0;
}

/* The holder that `source` has already, or NOBODY. It looks only at holders that may be registered:
 * with more sources in flight than that, a source may have several. */
static inline uint32_t
holder_find(const struct inflight *table, const Source *source)
{
    uint32_t index = table->last_holder;
    if (index != NOBODY && table->holders[index].source == source) {
        return index;
    }
    for (index = 0; index < table->holders_allocated && index < REGISTERED_FILES; index++) {
        const struct holder *holder = &table->holders[index];
        if (holder->source == source && (holder->registered || holder_is_busy(holder))) {
            return index;
        }
    }
    return NOBODY;
}

/* A holder of `source` for one batch, which itself counts as waiting until holder_drop, so that the
 * source stays while the batch waits for room. One that is not `lasting` was made for this batch.
 * NOBODY: the source is closed, or no memory. */
static inline uint32_t
holder_for(struct inflight *table, Source *source, bool lasting)
{
    uint32_t index = lasting ? holder_find(table, source) : NOBODY;
    if (source_is_closed(source)) {
        return NOBODY;
    }
    if (index == NOBODY) {
        if ((table->free_holder == NOBODY && !holders_grow(table)) ||
            !gdsdirect_source_acquire(source)) {
            return NOBODY;
        }
        index = table->free_holder;
        table->free_holder = table->holders[index].next;
        table->holders[index].source = (Source *)Py_NewRef(source);
        table->holders[index].acquired = true;
    }
    table->holders[index].waiting++;
    if (lasting) {
        table->last_holder = index;
    }
    return index;
}

/* The descriptor is held open no longer; at once, for it may be closed already. */
static inline void
holder_release(struct holder *holder)
{
    if (holder->acquired) {
        holder->acquired = false;
        gdsdirect_source_release(holder->source);
    }
}

/* Nothing needs a holder any more: its reference is let go of later. */
static inline void
holder_finish(struct inflight *table, uint32_t index)
{
    struct holder *holder = &table->holders[index];
    if (table->last_holder == index) {
        table->last_holder = NOBODY;
    }
    holder_release(holder);
    holder->registered = false;
    holder->next = table->finished_holder;
    table->finished_holder = index;
}

/* `count` outcomes, requests or batches need the holder no more. */
static inline void
holder_drop(struct inflight *table, uint32_t index, uint32_t count)
{
    struct holder *holder = &table->holders[index];
    holder->waiting -= count;
    if (!holder_is_busy(holder) && !holder->registered) {
        holder_finish(table, index);
    }
}

/* The ring's table of files is gone. Holders that only the table needed end now; those that an outcome
 * or a batch still needs end by holder_drop. */
static inline void
holders_unregister(struct inflight *table)
{
    for (uint32_t i = 0; i < table->holders_allocated; i++) {
        struct holder *holder = &table->holders[i];
        if (holder->registered) {
            holder->registered = false;
            if (!holder_is_busy(holder)) {
                holder_finish(table, i);
            }
        }
    }
}

/* A source that nothing needs any more, for the caller to Py_DECREF without the lock; or NULL. */
static inline Source *
inflight_finished_source(struct inflight *table)
{
    uint32_t index = table->finished_holder;
    if (index == NOBODY) {
        return NULL;
    }
    struct holder *holder = &table->holders[index];
    Source *source = holder->source;
    table->finished_holder = holder->next;
    holder->source = NULL;
    holder->next = table->free_holder;
    table->free_holder = index;
    return source;
}

/* ---- Slots ------------------------------------------------------------------------------- */

/* The slot is to be of this command. */
static inline void
slot_set_command(struct slot *slot, const struct command *command)
{
    slot->position = command->position;
    slot->address = command->address;
    slot->nbytes = command->nbytes;
    slot->registered = command->registered;
}

/* Takes a free slot; there must be one, a reserved outcome, and `slot.holder` from holder_for, whose
 * `flying` the caller counts. Returns what goes into the SQE's user_data. */
static inline uint64_t
inflight_take(struct inflight *table, struct slot slot)
{
    uint32_t index = table->free_slots[--table->free_count];
    slot.generation = table->slots[index].generation + 1;
    table->slots[index] = slot;
    return (uint64_t)slot.generation << 32 | index;
}

/* The slot of a command in flight; NULL for an id that is not one. */
static inline struct slot *
inflight_find(struct inflight *table, uint64_t id)
{
    uint32_t index = (uint32_t)id;
    if (index >= table->depth || table->slots[index].generation != (uint32_t)(id >> 32)) {
        return NULL;
    }
    return &table->slots[index];
}

/* A slot's generation is odd while it is taken. */
static inline bool
slot_is_taken(const struct slot *slot)
{
    return slot->generation & 1;
}

static inline void
slot_free(struct inflight *table, struct slot *slot)
{
    slot->generation++; /* the id is spent, even before the slot is taken again */
    table->free_slots[table->free_count++] = (uint32_t)(slot - table->slots);
}

/* Takes back a command that the kernel never saw; its batch holds the source still. */
static inline void
inflight_undo(struct inflight *table, struct slot *slot)
{
    slot_free(table, slot);
    table->holders[slot->holder].flying--;
}

/* The bytes that a command brought, by the kernel's result. */
static inline uint32_t
bytes_of_result(const struct slot *slot, int32_t res)
{
    if (slot->way == WAY_PASSTHROUGH) {
        return res == 0 ? slot->nbytes : 0; /* 0 is success of the whole command */
    }
    return res > 0 ? (uint32_t)res : 0;
}

/* The kernel is done with a command: its slot is free, its outcome waits. */
static inline struct outcome *
inflight_complete(struct inflight *table, struct slot *slot, int32_t res)
{
    struct outcome *outcome = outcome_at(table, table->ready++);
    *outcome = (struct outcome){
        .user_data = slot->user_data,
        .position = slot->position,
        .expected = slot->nbytes,
        .res = res,
        .holder = slot->holder,
        .way = slot->way,
    };
    outcome->nbytes = bytes_of_result(slot, res);
    slot_free(table, slot);
    table->holders[slot->holder].flying--;
    table->holders[slot->holder].waiting++;
    return outcome;
}

#endif
