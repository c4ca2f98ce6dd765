/*
 * The ring's errors, its lock, and its descriptors for event loops.
 */
#include "ring.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

/* ---- Errors ------------------------------------------------------------------------------ */

void
ring_raise_errno(int number, const char *call, PyObject *path)
{
    PyObject *errors = PyImport_ImportModule("gdsdirect.errors");
    PyObject *error = errors ? PyObject_CallMethod(errors, "call_error", "isO", number, call,
                                                   path ? path : Py_None)
                             : NULL;
    if (error != NULL) {
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
        Py_DECREF(error);
    }
    Py_XDECREF(errors);
}

PyObject *
ring_raise(int outcome, const char *call)
{
    switch (outcome) {
    case RAISED:
        break;
    case STREAM_CLOSED:
        PyErr_SetString(PyExc_ValueError, "the stream is closed");
        break;
    case NO_MEMORY:
        PyErr_NoMemory();
        break;
    default:
        ring_raise_errno(outcome, call, NULL);
    }
    return NULL;
}

bool
ring_is_forked(const Ring *self)
{
    return *self->fork_mark == 0;
}

int
ring_check_process(const Ring *self)
{
    if (ring_is_forked(self)) {
        PyErr_SetString(PyExc_RuntimeError,
                        "the stream belongs to the process that made it, and this one is its "
                        "fork: make a stream of your own here");
        return -1;
    }
    return 0;
}

int
ring_check_thread(const Ring *self)
{
    if (ring_check_process(self) < 0) {
        return -1;
    }
    if (self->setup_flags & IORING_SETUP_SINGLE_ISSUER &&
        !pthread_equal(self->owner_thread, pthread_self())) {
        PyErr_SetString(PyExc_RuntimeError,
                        "the stream was made with single_thread=True by another thread: use it "
                        "there, or make it without");
        return -1;
    }
    return 0;
}

int
ring_check_caller(Ring *self)
{
    if (self->state != RING_OPEN) {
        ring_raise(STREAM_CLOSED, NULL);
        return -1;
    }
    return ring_check_thread(self);
}

/* ---- The lock ---------------------------------------------------------------------------- */

/* event_fd is readable as long as outcomes wait. */
static void
set_event_locked(Ring *self)
{
    bool wanted = self->table.ready > 0;
    if (self->event_fd < 0 || wanted == self->event_is_set) {
        return;
    }
    uint64_t value = 1;
    ssize_t done = wanted ? write(self->event_fd, &value, sizeof(value))
                          : read(self->event_fd, &value, sizeof(value));
    if (done == sizeof(value)) {
        self->event_is_set = wanted;
    }
}

/* arrival_fd is readable as long as there are CQEs to consume. Cleared first and looked for after,
 * so that one that comes between the two is not missed. */
static void
clear_arrivals_locked(Ring *self)
{
    uint64_t value;
    if (self->arrival_fd < 0 || !self->arrival_consumed) {
        return;
    }
    self->arrival_consumed = false;
    ssize_t ignored = read(self->arrival_fd, &value, sizeof(value));
    if (io_uring_cq_ready(&self->ring) > 0 || ring_has_deferred(self)) {
        value = 1;
        ignored = write(self->arrival_fd, &value, sizeof(value));
    }
    (void)ignored; /* a counter that is 0 already, or as high as it gets: both are right */
}

void
ring_unlock(Ring *self)
{
    for (;;) {
        set_event_locked(self);
        clear_arrivals_locked(self);
        Source *finished = inflight_finished_source(&self->table);
        bool more = self->table.finished_holder != NOBODY;
        pthread_mutex_unlock(&self->lock);
        Py_XDECREF(finished);
        if (!more) {
            return;
        }
        ring_lock(self);
    }
}

/* ---- Descriptors for event loops --------------------------------------------------------- */

/* A descriptor that is readable while there are CQEs to consume: the ring's own, if the kernel wakes
 * those who poll it. With DEFER_TASKRUN it does not for completions that it deferred (6.18; only 6.1
 * did), but signals an eventfd that is registered. -1 with errno set. */
static int
arrival_fd_locked(Ring *self)
{
    if (!(self->setup_flags & IORING_SETUP_DEFER_TASKRUN)) {
        return self->ring.ring_fd;
    }
    if (self->arrival_fd < 0) {
        int event = eventfd(1, EFD_CLOEXEC | EFD_NONBLOCK); /* 1: what is there already */
        int failed = event < 0 ? -errno : io_uring_register_eventfd(&self->ring, event);
        if (failed < 0) {
            if (event >= 0) {
                close(event);
            }
            errno = -failed;
            return -1;
        }
        self->arrival_fd = event;
        self->arrival_consumed = true;
    }
    return self->arrival_fd;
}

/* Whether anything wakes those who sleep until completions come. */
static int
check_wakes(Ring *self)
{
    if (ring_check_caller(self) < 0) {
        return -1;
    }
    if (self->setup_flags & IORING_SETUP_IOPOLL) {
        PyErr_SetString(PyExc_ValueError,
                        "a stream with iopoll=True has no descriptor that becomes readable, since "
                        "nothing completes until it polls: use wait() or poll()");
        return -1;
    }
    return 0;
}

/* Makes event_fd and epoll_fd. 0 or a positive errno. */
static int
open_events_locked(Ring *self)
{
    struct epoll_event readable = {.events = EPOLLIN};
    const int arrivals = arrival_fd_locked(self);
    if (arrivals < 0) {
        return errno;
    }
    const int event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    const int epoll = epoll_create1(EPOLL_CLOEXEC);
    if (event < 0 || epoll < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, event, &readable) < 0 ||
        epoll_ctl(epoll, EPOLL_CTL_ADD, arrivals, &readable) < 0) {
        const int failed = errno;
        if (event >= 0) {
            close(event);
        }
        if (epoll >= 0) {
            close(epoll);
        }
        return failed;
    }
    self->event_fd = event;
    self->epoll_fd = epoll;
    return 0;
}

PyObject *
ring_fileno(Ring *self, PyObject *Py_UNUSED(ignored))
{
    if (check_wakes(self) < 0) {
        return NULL;
    }
    ring_lock(self);
    int failed = self->event_fd < 0 ? open_events_locked(self) : 0;
    int fd = self->epoll_fd;
    ring_unlock(self);
    return failed ? ring_raise(failed, "epoll_create1") : PyLong_FromLong(fd);
}

void
ring_tell_watchers_locked(Ring *self)
{
    const uint64_t one = 1;
    for (size_t i = 0; i < self->watcher_count; i++) {
        /* It fails only when 2**64 - 2 tellings were not heard, and then it is readable already. */
        ssize_t ignored = write(self->watchers[i], &one, sizeof(one));
        (void)ignored;
    }
}

static int
add_watcher_locked(Ring *self, int fd)
{
    int *watchers = realloc(self->watchers, (self->watcher_count + 1) * sizeof(*watchers));
    if (watchers == NULL) {
        return ENOMEM;
    }
    self->watchers = watchers;
    self->watchers[self->watcher_count++] = fd;
    return 0;
}

/* _watch() -> (arrivals, event): two descriptors for an event loop to read, the first to be closed by it
 * and the second by _unwatch(event). */
PyObject *
ring_watch(Ring *self, PyObject *Py_UNUSED(ignored))
{
    if (check_wakes(self) < 0) {
        return NULL;
    }
    ring_lock(self);
    int failed = 0, event = -1;
    int arrivals = arrival_fd_locked(self);
    if (arrivals < 0 || (arrivals = fcntl(arrivals, F_DUPFD_CLOEXEC, 0)) < 0 ||
        (event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) < 0) {
        failed = errno;
    }
    else {
        failed = add_watcher_locked(self, event);
    }
    ring_unlock(self);
    if (failed == 0) {
        return Py_BuildValue("(ii)", arrivals, event);
    }
    if (arrivals >= 0) {
        close(arrivals);
    }
    if (event >= 0) {
        close(event);
    }
    return ring_raise(failed, "eventfd");
}

PyObject *
ring_unwatch(Ring *self, PyObject *event)
{
    int fd = PyLong_AsInt(event);
    if ((fd == -1 && PyErr_Occurred()) || ring_check_process(self) < 0) {
        return NULL;
    }
    ring_lock(self);
    for (size_t i = 0; i < self->watcher_count; i++) {
        if (self->watchers[i] == fd) {
            self->watchers[i] = self->watchers[--self->watcher_count];
            close(fd);
            break;
        }
    }
    ring_unlock(self);
    Py_RETURN_NONE;
}
