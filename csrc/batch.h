/*
 * A batch of checked commands: check.c fills it, and batch.c sends it.
 */
#ifndef GDSDIRECT_BATCH_H
#define GDSDIRECT_BATCH_H

#include "ring.h"

/* Commands that read one source by one data path. */
struct batch {
    Source *source; /* a reference of the batch's own */
    bool lasting;   /* the source outlives the call: its file is worth registering */
    enum way way;
    uint32_t holder;
    struct command *commands;
    size_t count;
    size_t sent;
    uint64_t first_user_data;
    struct command few[64]; /* saves an allocation */
};

/* Makes room for `count` commands. Returns -1 with MemoryError. */
int batch_allocate(struct batch *batch, size_t count);
void batch_clear(struct batch *batch);

/* Sends checked batches. Gives each command its user_data, which count up through all of them. Returns -1
 * with an exception. */
int send_batches(Ring *self, struct batch *batches, size_t n, PyObject *user_data);

/* Sends one batch, as most calls do. The compiler makes separate, faster code for it. */
int send_batch(Ring *self, struct batch *batch, PyObject *user_data);

#endif
