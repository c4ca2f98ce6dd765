/*
 * Completions out: consumed, waited for, handed over.
 */
#ifndef GDSDIRECT_REAP_H
#define GDSDIRECT_REAP_H

#include "ring.h"

/* Consumes the CQEs that are there. */
void ring_reap_locked(Ring *self);

/* Waits, without the lock, until something has changed: a CQE came, time is up, or another thread
 * did something. The caller looks again. `awaits` is how many CQEs it is waiting for. */
int ring_wait_locked(Ring *self, unsigned awaits, int64_t deadline);

/* Makes the leader come back, whether it sleeps in the kernel or is just about to: by as many CQEs
 * of our own as it waits for. */
void ring_call_leader_locked(Ring *self);

/* Wakes the followers, to look again. */
void ring_tell_followers_locked(Ring *self);

/* None or seconds, as a moment of CLOCK_MONOTONIC in ns. -1 with an exception. */
int ring_deadline(PyObject *timeout, int64_t *deadline);
int64_t ring_now(void);

PyObject *ring_take(Ring *self, PyObject *args);
PyObject *ring_wait_into(Ring *self, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords);
PyObject *ring_look(Ring *self, PyObject *ignored);

#endif
