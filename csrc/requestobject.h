/*
 * The type Request, and the methods of the Ring that make and carry out requests.
 */
#ifndef GDSDIRECT_REQUESTOBJECT_H
#define GDSDIRECT_REQUESTOBJECT_H

#include "ring.h"

PyObject *ring_request(Ring *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *ring_lend_bounce(Ring *self, PyObject *memory);
PyObject *ring_carry_out(Ring *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *ring_start(Ring *self, PyObject *requests);
PyObject *ring_read(Ring *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *ring_begin(Ring *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *ring_method_clear_the_way(Ring *self, PyObject *ignored);
PyObject *ring_method_in_the_way(Ring *self, PyObject *ignored);
PyObject *ring_arrived(Ring *self, PyObject *watch);

#endif
