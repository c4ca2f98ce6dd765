/*
 * What callers submit: methods of the Ring.
 */
#ifndef GDSDIRECT_SUBMIT_H
#define GDSDIRECT_SUBMIT_H

#include "ring.h"

PyObject *ring_submit_nvme_passthrough(Ring *self, PyObject *const *args, Py_ssize_t nargs,
                                       PyObject *keywords);
PyObject *ring_submit_nvme_passthroughs(Ring *self, PyObject *args, PyObject *kwargs);
PyObject *ring_submit_read(Ring *self, PyObject *args, PyObject *kwargs);
PyObject *ring_submit_read_fixed(Ring *self, PyObject *args, PyObject *kwargs);
PyObject *ring_submit_reads(Ring *self, PyObject *args, PyObject *kwargs);
PyObject *ring_submit_reads_fixed(Ring *self, PyObject *args, PyObject *kwargs);

#endif
