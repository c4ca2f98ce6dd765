/*
 * The trust boundary: what callers give, as commands that may be sent, or refused.
 */
#ifndef GDSDIRECT_CHECK_H
#define GDSDIRECT_CHECK_H

#include "batch.h"

/* Fills a batch with the commands in `wire`. -1 with ValueError if one of them may not be sent. */
int check_commands(const Ring *self, struct batch *batch, const Py_buffer *wire);

/* The registered buffer that holds all of the range, or NOT_REGISTERED. */
uint16_t check_registered(const Ring *self, uint64_t offset, uint32_t nbytes);

/* One read of a file, as a command that may be sent. -1 with an exception that names the argument. */
int check_file_read(const Ring *self, struct command *command, PyObject *file_offset,
                    PyObject *nbytes, PyObject *target_offset);

/* What the caller gave for a batch of reads: arrays, and one size for all or an array of them. */
struct read_arrays {
    Py_buffer offsets;
    Py_buffer sizes;
    Py_buffer targets;
    uint32_t one_size;
    bool has_sizes;
};

/* -1 with an exception; either way read_arrays_release ends them, which were zeroed at first. */
int read_arrays_get(const Ring *self, struct read_arrays *arrays, PyObject *file_offsets,
                    PyObject *nbytes, PyObject *target_offsets);
void read_arrays_release(struct read_arrays *arrays);

/* Read `index` of the arrays, as a command that may be sent. -1 with ValueError. */
int check_array_read(const Ring *self, const struct read_arrays *arrays, size_t index,
                     struct command *command);

/* Fills a batch with all reads of the arrays. -1 with an exception. */
int check_array_reads(const Ring *self, const struct read_arrays *arrays, struct batch *batch);

/* Of reads into bounce slots: bytes to skip of each, and bytes that are wanted. */
struct wanted_arrays {
    Py_buffer skips;
    Py_buffer sizes;
};

/* Fills a request, whose sources are there, with all reads of the arrays; `wanted` is NULL for those that
 * go straight into their place. -1 with ValueError. */
int check_request(const Ring *self, struct request *request, const struct read_arrays *arrays,
                  const struct wanted_arrays *wanted, bool fixed);

#endif
