/*
 * The trust boundary: makes commands that may be sent of what callers give, or refuses it.
 */
#ifndef GDSDIRECT_CHECK_H
#define GDSDIRECT_CHECK_H

#include "batch.h"

/* Fills a batch with the commands in `wire`. If one of them may not be sent, returns -1 with ValueError. */
int check_commands(const Ring *self, struct batch *batch, const Py_buffer *wire);

/* Returns the index of the registered buffer that holds all of the range, or NOT_REGISTERED. */
uint16_t check_registered(const Ring *self, uint64_t offset, uint32_t nbytes);

/* Makes a command of one read of a file. If it may not be sent, returns -1 with an exception that names the
 * argument. */
int check_file_read(const Ring *self, struct command *command, PyObject *file_offset,
                    PyObject *nbytes, PyObject *target_offset);

/* The caller's arguments for a batch of reads: two arrays, and one size for all or an array of sizes. */
struct read_arrays {
    Py_buffer offsets;
    Py_buffer sizes;
    Py_buffer targets;
    uint32_t one_size;
    bool has_sizes;
};

/* Fills `arrays`, which the caller has zeroed. Returns -1 with an exception; read_arrays_release ends them
 * either way. */
int read_arrays_get(const Ring *self, struct read_arrays *arrays, PyObject *file_offsets,
                    PyObject *nbytes, PyObject *target_offsets);
void read_arrays_release(struct read_arrays *arrays);

/* Fills a batch with all reads of the arrays. Returns -1 with an exception if one may not be sent. */
int check_array_reads(const Ring *self, const struct read_arrays *arrays, struct batch *batch);

/* For each read into a bounce slot, the bytes to skip and the bytes that are wanted. */
struct wanted_arrays {
    Py_buffer skips;
    Py_buffer sizes;
};

/* Fills a request, which has its sources, with all reads of the arrays. `wanted` is NULL for reads that go
 * straight into their place. Returns -1 with ValueError if one may not be sent. */
int check_request(const Ring *self, struct request *request, const struct read_arrays *arrays,
                  const struct wanted_arrays *wanted, bool fixed);

#endif
