/*
 * Checked commands, and their sending: what check.c fills and batch.c sends.
 */
#ifndef GDSDIRECT_BATCH_H
#define GDSDIRECT_BATCH_H

#include "ring.h"

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
    struct command few[64]; /* saves an allocation */
};

/* Room for `count` commands. -1 with MemoryError. */
int batch_allocate(struct batch *batch, size_t count);
void batch_clear(struct batch *batch);

/* Sends checked batches, and gives their commands their user_data, which count up through all of
 * them. -1 with an exception. */
int send_batches(Ring *self, struct batch *batches, size_t n, PyObject *user_data);

/* The same of one, which most calls have: the compiler makes code of its own for it. */
int send_batch(Ring *self, struct batch *batch, PyObject *user_data);

#endif
