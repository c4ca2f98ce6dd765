/*
 * Completions out: consumed from the CQ, waited for, handed over.
 */
#include "reap.h"

#include <errno.h>
#include <math.h>

#include "carry.h"
#include "sqe.h"

#define RECORD_BYTES 16 /* struct "QiI": user_data, res, nbytes */

/* ---- Time -------------------------------------------------------------------------------- */

int
ring_deadline(PyObject *timeout, int64_t *deadline)
{
    if (timeout == NULL || timeout == Py_None) {
        *deadline = NO_DEADLINE;
        return 0;
    }
    double seconds = PyFloat_AsDouble(timeout);
    if (seconds == -1.0 && PyErr_Occurred()) {
        return -1;
    }
    if (!(seconds >= 0)) {
        PyErr_Format(PyExc_ValueError, "timeout is %R: give None or seconds from 0 up", timeout);
        return -1;
    }
    if (seconds == 0) {
        *deadline = DEADLINE_PASSED;
    }
    else {
        *deadline = seconds > 1e9 ? NO_DEADLINE : ring_now() + (int64_t)ceil(seconds * 1e9);
    }
    return 0;
}

PyObject *
gdsdirect_deadline(PyObject *Py_UNUSED(module), PyObject *timeout)
{
    int64_t deadline;
    if (ring_deadline(timeout, &deadline) < 0) {
        return NULL;
    }
    return deadline == NO_DEADLINE ? Py_NewRef(Py_None) : PyLong_FromLongLong(deadline);
}

/* A wait is cut short after a second, to look for a signal that came just before it. */
#define SLICE INT64_C(1000000000)

/* ns that a request is driven for before signals are looked for, although none ended a wait. */
#define LOOK_EVERY INT64_C(50000000)

static int64_t
end_of_slice(int64_t deadline)
{
    const int64_t now = ring_now();
    return deadline - now < SLICE ? deadline : now + SLICE;
}

/* ---- Consuming --------------------------------------------------------------------------- */

void
ring_call_leader_locked(Ring *self)
{
    self->leader_called = true;
    ring_send_own_locked(self, IORING_OP_NOP, self->leader_awaits);
}

void
ring_reap_locked(Ring *self)
{
    struct io_uring_cqe *cqe;
    const size_t ready = self->table.ready;
    unsigned head, seen = 0;
    if (self->state == RING_CLOSED) {
        return; /* by another thread, once what this one waits for had finished */
    }

    io_uring_for_each_cqe(&self->ring, head, cqe) {
        struct slot *slot = inflight_find(&self->table, cqe->user_data);
        seen++;
        if (slot == NULL || /* one of the ring's own */
            (cqe->res < 0 && ring_resend_locked(self, slot, cqe->user_data, cqe->res))) {
            continue;
        }
        if (slot->request != NULL) {
            request_land_locked(self, slot, cqe->res);
        }
        else {
            const struct outcome *outcome = inflight_complete(&self->table, slot, cqe->res);
            counters_land(&self->counters[outcome->way], outcome->nbytes, outcome->expected);
        }
    }
    if (seen == 0) {
        return;
    }
    CHAOS_POINT();
    io_uring_cq_advance(&self->ring, seen);
    CHAOS_POINT();
    self->arrival_consumed = true;
    if (self->table.ready > ready) {
        ring_wake_locked(self, NULL);
        ring_tell_watches_locked(self);
    }
    if (self->first_queued != NULL) {
        request_pump_locked(self); /* into the room that they leave */
    }
    if (self->has_leader) {
        /* What it waits for was consumed here, perhaps the CQEs that were to call it too. */
        ring_call_leader_locked(self);
    }
}

void
ring_fetch_locked(Ring *self)
{
    if (self->state == RING_CLOSED) {
        return;
    }
    if (self->setup_flags & IORING_SETUP_IOPOLL || ring_has_deferred(self)) {
        io_uring_get_events(&self->ring);
        self->arrival_consumed = true; /* even if no CQE came of it */
    }
    ring_reap_locked(self);
}

/* ---- Waiting ----------------------------------------------------------------------------- */

/* A polled ring spins: in the kernel there is no interrupt to sleep for. It comes back now and
 * then, so that signals are seen. */
static int
spin_for_cqes(Ring *self, int64_t deadline)
{
    const int64_t slice = 10 * 1000 * 1000;
    const int64_t now = ring_now();
    const int64_t until = deadline - now < slice ? deadline : now + slice;
    int result;
    do {
        result = io_uring_enter(self->ring.enter_ring_fd, 0, 0,
                                IORING_ENTER_GETEVENTS | self->enter_flags, NULL);
    } while (result >= 0 && io_uring_cq_ready(&self->ring) == 0 && ring_now() < until);
    return result;
}

static int
sleep_for_cqes(Ring *self, unsigned count, int64_t until)
{
    const unsigned flags = IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG | self->enter_flags;
    struct timespec left = ring_time_left(until);
    struct io_uring_getevents_arg arg = {
        .ts = (uintptr_t)&left, /* struct __kernel_timespec: the same on 64 bits */
    };
    return io_uring_enter2(self->ring.enter_ring_fd, 0, count, flags, (void *)&arg, sizeof(arg));
}

/* Waits in the kernel, on behalf of all. */
static int
lead_locked(Ring *self, unsigned awaits, int64_t deadline, bool *interrupted)
{
    /* With several threads each CQE may be the one that another waits for. */
    const unsigned in_flight = inflight_count(&self->table);
    if (self->followers != NULL || self->setup_flags & IORING_SETUP_SQPOLL || awaits == 0) {
        awaits = 1;
    }
    else if (awaits > in_flight) {
        awaits = in_flight;
    }
    self->has_leader = true;
    self->leader_called = false;
    self->leader_awaits = awaits;
    pthread_mutex_unlock(&self->lock);

    const int64_t until = end_of_slice(deadline);
    const int result = self->setup_flags & IORING_SETUP_IOPOLL
                           ? spin_for_cqes(self, until)
                           : sleep_for_cqes(self, awaits, until);
    pthread_mutex_lock(&self->lock);
    self->has_leader = false;
    ring_reap_locked(self);
    *interrupted = result == -EINTR;
    return result < 0 && result != -ETIME && result != -EINTR ? -result : DONE;
}

/* Waits until it is woken: by what it waits for, or to lead. */
static void
follow_locked(Ring *self, const struct request *request, int64_t deadline, bool *interrupted)
{
    struct follower here = {.next = self->followers, .request = request};
    if (self->leader_awaits > 1 && !self->leader_called) {
        ring_call_leader_locked(self);
    }
    CHAOS_POINT();
    self->followers = &here;
    pthread_mutex_unlock(&self->lock);
    *interrupted = ring_follow(&here, end_of_slice(deadline));
    pthread_mutex_lock(&self->lock);

    struct follower **link = &self->followers;
    while (*link != &here) {
        link = &(*link)->next;
    }
    *link = here.next;
}

/* One wait, as leader or follower, without the GIL. `interrupted`: by a signal. */
static int
wait_once_locked(Ring *self, const struct request *request, unsigned awaits, int64_t deadline,
                 bool *interrupted)
{
    int result = DONE;
    if (!self->has_leader) {
        result = lead_locked(self, awaits, deadline, interrupted);
    }
    else {
        follow_locked(self, request, deadline, interrupted);
    }
    ring_pass_the_lead_locked(self);
    return result;
}

int
ring_wait_locked(Ring *self, unsigned awaits, int64_t deadline)
{
    int result;
    bool interrupted;
    Py_BEGIN_ALLOW_THREADS
    result = wait_once_locked(self, NULL, awaits, deadline, &interrupted);
    pthread_mutex_unlock(&self->lock);
    Py_END_ALLOW_THREADS

    /* Handlers run Python code, which may use this very ring: not under its lock. */
    CHAOS_POINT();
    int raised = PyErr_CheckSignals();
    ring_lock(self);
    return raised < 0 ? RAISED : result;
}

/* How many CQEs to wait for at once: all that are left of the request, but only half of what is in
 * flight while there is more to send, so that the drive is kept busy. */
static unsigned
awaits_of(const Ring *self, const struct request *request)
{
    const unsigned in_flight = inflight_count(&self->table);
    const size_t wanted = self->first_queued != NULL ? in_flight / 2 : request->left;
    return wanted < in_flight ? (unsigned)wanted : in_flight;
}

/* Drives the ring until the request has finished, without the GIL; or until it is time to look for
 * signals, which `look` then says. */
static int
drive_locked(Ring *self, const struct request *request, int64_t deadline, bool *look)
{
    const int64_t until = ring_now() + LOOK_EVERY;
    int result = DONE;
    for (;;) {
        ring_reap_locked(self);
        if (request->left == 0 || result != DONE) {
            return result;
        }
        const int64_t now = ring_now();
        if (now >= deadline) {
            return ETIME;
        }
        if (*look || now >= until) {
            *look = true;
            return DONE;
        }
        result = wait_once_locked(self, request, awaits_of(self, request), deadline, look);
    }
}

int
ring_finish_locked(Ring *self, const struct request *request, int64_t deadline)
{
    for (;;) {
        bool look = false;
        int result;
        Py_BEGIN_ALLOW_THREADS
        result = drive_locked(self, request, deadline, &look);
        pthread_mutex_unlock(&self->lock); /* others need not wait until this thread has the GIL */
        Py_END_ALLOW_THREADS
        CHAOS_POINT();
        const int raised = look ? PyErr_CheckSignals() : 0;
        ring_lock(self);
        if (!look || raised < 0) {
            return raised < 0 ? RAISED : result;
        }
    }
}

/* ---- What was given up ------------------------------------------------------------------- */

int
ring_clear_the_way(const Ring *self, int64_t deadline)
{
    int result = DONE;
    Ring *ring;
    while (result == DONE && (ring = request_in_the_way(self)) != NULL) {
        CHAOS_POINT();
        ring_lock(ring);
        ring_reap_locked(ring);
        while (result == DONE && request_is_in_the_way_locked(self, ring)) {
            result = ring_now() < deadline ? ring_wait_locked(ring, 1, deadline) : ETIME;
            ring_reap_locked(ring);
        }
        ring_unlock(ring);
        Py_DECREF(ring);
    }
    return result;
}

void
ring_collect_given_up(struct module_state *module)
{
    Ring *rings[16];
    const size_t count = request_rings_of_given_up(module, rings, sizeof(rings) / sizeof(rings[0]));
    for (size_t i = 0; i < count; i++) {
        ring_lock(rings[i]);
        ring_reap_locked(rings[i]);
        ring_unlock(rings[i]);
        Py_DECREF(rings[i]);
    }
}

/* ---- Waiting for completions ------------------------------------------------------------- */

/* Takes the lock, and returns when `count` outcomes are ready, time is up, or nothing is left to
 * wait for. The lock stays taken. */
static int
lock_and_collect(Ring *self, size_t count, int64_t deadline)
{
    ring_lock(self);
    if (self->state != RING_OPEN) {
        return STREAM_CLOSED;
    }
    ring_forget_closed_locked(self);
    if (count == 0 || deadline == DEADLINE_PASSED) {
        ring_fetch_locked(self);
    }
    for (;;) {
        ring_reap_locked(self);
        const size_t ready = self->table.ready;
        if (ready >= count || inflight_count(&self->table) == 0 || ring_now() >= deadline) {
            return DONE;
        }
        size_t missing = count - ready;
        int result =
            ring_wait_locked(self, missing < UINT32_MAX ? (unsigned)missing : UINT32_MAX, deadline);
        if (result != DONE) {
            return result;
        }
        if (self->state != RING_OPEN) {
            return STREAM_CLOSED;
        }
    }
}

/* ---- Handing over ------------------------------------------------------------------------ */

/* The first `count` outcomes are no longer in the queue. */
static void
pop_locked(Ring *self, size_t count)
{
    struct inflight *table = &self->table;
    table->ready -= count;
    table->first = table->ready > 0 ? table->first + count : 0; /* in the cache still */
    if (table->ready == 0 && inflight_count(table) == 0) {
        ring_tell_watches_locked(self);
    }
}

/* A Completion, which the ring's class makes of itself and a tuple. The holder can't change: the outcome
 * counts in it. */
static PyObject *
completion_of(Ring *self, PyObject *make, const struct outcome *outcome, Source *source)
{
    PyObject *fields = Py_BuildValue(
        "(KiIIKIO)", (unsigned long long)outcome->user_data, (int)outcome->res,
        (unsigned)outcome->nbytes, (unsigned)outcome->expected,
        (unsigned long long)outcome->position, (unsigned)outcome->way, (PyObject *)source);
    if (fields == NULL) {
        return NULL;
    }
    PyObject *const args[] = {(PyObject *)self, fields};
    PyObject *completion = PyObject_Vectorcall(make, args, 2, NULL);
    Py_DECREF(fields);
    return completion;
}

struct taken {
    struct outcome outcome;
    Source *source;
};

static PyObject *
list_of_completions(Ring *self, PyObject *make, const struct taken *taken, size_t count)
{
    PyObject *list = PyList_New((Py_ssize_t)count);
    for (size_t i = 0; list != NULL && i < count; i++) {
        PyObject *item = completion_of(self, make, &taken[i].outcome, taken[i].source);
        if (item == NULL) {
            Py_CLEAR(list);
            break;
        }
        PyList_SET_ITEM(list, (Py_ssize_t)i, item);
    }
    return list;
}

/* The caller has them now. Where that failed, they go back into the queue as they were. */
static void
settle_taken_locked(Ring *self, const struct taken *taken, size_t count, bool handed_over)
{
    self->table.on_the_way -= count;
    for (size_t i = count; i-- > 0;) {
        if (handed_over) {
            holder_drop(&self->table, taken[i].outcome.holder, 1);
        }
        else {
            self->table.first--;
            *outcome_at(&self->table, 0) = taken[i].outcome;
            self->table.ready++;
        }
    }
    if (!handed_over && count > 0) {
        ring_wake_locked(self, NULL);
        ring_tell_watches_locked(self);
    }
}

/* The outcomes that are ready, `most` at most, as a list of Completions; all stay ready if that fails. With
 * the lock, which is free afterwards. */
static PyObject *
take_ready(Ring *self, PyObject *make, size_t most)
{
    const size_t count = self->table.ready < most ? self->table.ready : most;
    struct taken *taken = malloc((count ? count : 1) * sizeof(*taken));
    if (taken == NULL) {
        ring_unlock(self);
        return PyErr_NoMemory();
    }
    for (size_t i = 0; i < count; i++) {
        taken[i].outcome = *outcome_at(&self->table, i);
        taken[i].source = self->table.holders[taken[i].outcome.holder].source;
    }
    pop_locked(self, count);
    self->table.on_the_way += count;
    ring_unlock(self);

    CHAOS_POINT();
    PyObject *list = list_of_completions(self, make, taken, count);
    CHAOS_POINT();
    ring_lock(self);
    settle_taken_locked(self, taken, count, list != NULL);
    ring_unlock(self);
    free(taken);
    return list;
}

/* At least `count` completions, or fewer when time is up or nothing is left in flight; `most` at most. */
static PyObject *
take_completions(Ring *self, Py_ssize_t count, int64_t deadline, size_t most)
{
    if (count < 0) {
        return PyErr_Format(PyExc_ValueError, "count is %zd: give 0 or more", count);
    }
    if (ring_check_caller(self) < 0) {
        return NULL;
    }
    PyObject *make = PyObject_GetAttrString((PyObject *)self, "_completion");
    if (make == NULL) {
        return NULL;
    }
    const int result = lock_and_collect(self, (size_t)count, deadline);
    PyObject *list = NULL;
    if (result == DONE) {
        list = take_ready(self, make, most);
    }
    else {
        ring_unlock(self);
        ring_raise(self, result, "io_uring_enter");
    }
    Py_DECREF(make);
    return list;
}

PyObject *
ring_wait(Ring *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"count", "timeout", NULL};
    Py_ssize_t count = 1;
    PyObject *timeout = Py_None;
    int64_t deadline;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|nO:wait", names, &count, &timeout) ||
        ring_deadline(timeout, &deadline) < 0) {
        return NULL;
    }
    return take_completions(self, count, deadline, SIZE_MAX);
}

PyObject *
ring_poll(Ring *self, PyObject *Py_UNUSED(ignored))
{
    return take_completions(self, 0, NO_DEADLINE, SIZE_MAX);
}

/* _take_one(): a completion that is there, or NotImplemented. */
PyObject *
ring_take_one(Ring *self, PyObject *Py_UNUSED(ignored))
{
    PyObject *list = take_completions(self, 0, NO_DEADLINE, 1);
    if (list == NULL) {
        return NULL;
    }
    PyObject *one = PyList_GET_SIZE(list) > 0 ? PyList_GET_ITEM(list, 0) : Py_NotImplemented;
    Py_INCREF(one);
    Py_DECREF(list);
    return one;
}

static size_t
copy_records_locked(Ring *self, char *out, size_t fit)
{
    const size_t count = self->table.ready < fit ? self->table.ready : fit;
    uint32_t holder = NOBODY, dropped = 0; /* outcomes of one source come in runs */
    for (size_t i = 0; i < count; i++) {
        const struct outcome *outcome = outcome_at(&self->table, i);
        memcpy(out, &outcome->user_data, 8);
        memcpy(out + 8, &outcome->res, 4);
        memcpy(out + 12, &outcome->nbytes, 4);
        out += RECORD_BYTES;
        if (outcome->holder != holder && dropped > 0) {
            holder_drop(&self->table, holder, dropped);
            dropped = 0;
        }
        holder = outcome->holder;
        dropped++;
    }
    if (dropped > 0) {
        holder_drop(&self->table, holder, dropped);
    }
    pop_locked(self, count);
    return count;
}

static int
wait_into_arguments(PyObject *const *args, Py_ssize_t nargs, PyObject *keywords, Py_ssize_t *count,
                    int64_t *deadline)
{
    PyObject *given[3] = {NULL, NULL, NULL};
    static const char *const names[3] = {"out", "count", "timeout"};
    Py_ssize_t named = keywords ? PyTuple_GET_SIZE(keywords) : 0;
    if (nargs < 1 || nargs > 3) {
        PyErr_SetString(PyExc_TypeError, "wait_into(out, count=1, timeout=None) takes out first");
        return -1;
    }
    for (Py_ssize_t i = 1; i < nargs; i++) {
        given[i] = args[i];
    }
    for (Py_ssize_t k = 0; k < named; k++) {
        PyObject *name = PyTuple_GET_ITEM(keywords, k);
        int i = PyUnicode_CompareWithASCIIString(name, names[1]) == 0 ? 1 : 2;
        if (given[i] != NULL || PyUnicode_CompareWithASCIIString(name, names[i]) != 0) {
            PyErr_Format(PyExc_TypeError, "wait_into() got an unknown or a second argument '%U'",
                         name);
            return -1;
        }
        given[i] = args[nargs + k];
    }
    *count = given[1] ? PyNumber_AsSsize_t(given[1], PyExc_OverflowError) : 1;
    if (*count == -1 && PyErr_Occurred()) {
        return -1;
    }
    return ring_deadline(given[2], deadline);
}

PyObject *
ring_wait_into(Ring *self, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords)
{
    Py_ssize_t count;
    int64_t deadline;
    Py_buffer out;
    size_t copied = 0;

    if (wait_into_arguments(args, nargs, keywords, &count, &deadline) < 0 ||
        ring_check_caller(self) < 0 || PyObject_GetBuffer(args[0], &out, PyBUF_WRITABLE) < 0) {
        return NULL;
    }
    const Py_ssize_t fit = out.len / RECORD_BYTES;
    if (count < 0 || count > fit || fit == 0) {
        PyErr_Format(PyExc_ValueError, "count is %zd, and out has room for %zd records of 16 bytes",
                     count, fit);
        PyBuffer_Release(&out);
        return NULL;
    }
    int result = lock_and_collect(self, (size_t)count, deadline);
    if (result == DONE) {
        copied = copy_records_locked(self, out.buf, (size_t)fit);
    }
    ring_unlock(self);
    PyBuffer_Release(&out);
    return result == DONE ? PyLong_FromSize_t(copied) : ring_raise(self, result, "io_uring_enter");
}

/* _look(): consumes what is there, and says (ready, in flight). */
PyObject *
ring_look(Ring *self, PyObject *Py_UNUSED(ignored))
{
    if (ring_check_caller(self) < 0) {
        return NULL;
    }
    ring_lock(self);
    if (self->state != RING_OPEN) {
        ring_unlock(self);
        return ring_raise(self, STREAM_CLOSED, NULL);
    }
    ring_forget_closed_locked(self);
    ring_fetch_locked(self);
    const size_t ready = self->table.ready;
    const uint32_t in_flight = inflight_count(&self->table);
    ring_unlock(self);
    return Py_BuildValue("(nI)", (Py_ssize_t)ready, (unsigned)in_flight);
}
