/*
 * Consumes completions, waits for them, and hands them over.
 */
#ifndef GDSDIRECT_REAP_H
#define GDSDIRECT_REAP_H

#include "ring.h"

/* Consumes the CQEs that are there. */
void ring_reap_locked(Ring *self);

/* Consumes also the CQEs that the kernel posts only when it is asked. */
void ring_fetch_locked(Ring *self);

/* Waits, without the lock, until something has changed: a CQE came, time is up, or another thread
 * did something. The caller looks again. `awaits` is how many CQEs it is waiting for. */
int ring_wait_locked(Ring *self, unsigned awaits, int64_t deadline);

/* Makes the leader come back, whether it sleeps in the kernel or is just about to: by as many CQEs
 * of our own as it waits for. */
void ring_call_leader_locked(Ring *self);

/* Waits until the request has finished. Returns DONE, ETIME at the deadline, RAISED after a signal handler's
 * exception, or an errno. */
int ring_finish_locked(Ring *self, const struct request *request, int64_t deadline);

/* Waits until no request that was given up may write into this ring's memory, whichever ring it is of. Returns
 * what ring_finish_locked does. The caller holds the GIL, and no lock. */
int ring_clear_the_way(const Ring *self, int64_t deadline);

/* Consumes what has come back of requests that were given up, whichever ring they are of. */
void ring_collect_given_up(struct module_state *module);

/* Makes a moment of CLOCK_MONOTONIC, in ns, of None or seconds. Returns -1 with an exception. */
int ring_deadline(PyObject *timeout, int64_t *deadline);

PyObject *ring_wait(Ring *self, PyObject *args, PyObject *kwargs);
PyObject *ring_poll(Ring *self, PyObject *ignored);
PyObject *ring_take_one(Ring *self, PyObject *ignored);
PyObject *ring_wait_into(Ring *self, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords);
PyObject *ring_look(Ring *self, PyObject *ignored);

#endif
