/*
 * The ring's errors, its lock, those who wait for it, and its descriptors for event loops.
 */
#include "ring.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <time.h>
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
ring_raise(const Ring *self, int outcome, const char *call)
{
    switch (outcome) {
    case RAISED:
        break;
    case STREAM_CLOSED:
        PyErr_SetString(PyExc_ValueError,
                        self->shared ? "the buffer is closed" : "the stream is closed");
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
        PyErr_SetString(PyExc_RuntimeError, STREAM_OF_ANOTHER_PROCESS);
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
        ring_raise(self, STREAM_CLOSED, NULL);
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
        const bool more = self->table.finished_holder != NOBODY;
        struct request *to_free = self->to_free;
        uint32_t unowned = self->unowned;
        self->to_free = NULL;
        self->unowned = 0;
        pthread_mutex_unlock(&self->lock);
        CHAOS_POINT();
        Py_XDECREF(finished);
        request_free_all(to_free);
        for (; unowned > 0; unowned--) { /* never the last reference: the caller has one */
            Py_DECREF(self);
        }
        if (!more) {
            return;
        }
        ring_lock(self);
    }
}

/* ---- Followers --------------------------------------------------------------------------- */

static int
futex(_Atomic uint32_t *word, int operation, uint32_t value, const struct timespec *timeout)
{
    return (int)syscall(SYS_futex, word, operation | FUTEX_PRIVATE_FLAG, value, timeout, NULL, 0);
}

static void
wake(struct follower *follower)
{
    CHAOS_POINT();
    if (atomic_exchange(&follower->woken, 1) == 0) {
        futex(&follower->woken, FUTEX_WAKE, 1, NULL);
    }
}

void
ring_wake_locked(Ring *self, const struct request *request)
{
    for (struct follower *each = self->followers; each != NULL; each = each->next) {
        if (each->request == request) {
            wake(each);
        }
    }
}

void
ring_wake_all_locked(Ring *self)
{
    for (struct follower *each = self->followers; each != NULL; each = each->next) {
        wake(each);
    }
}

void
ring_pass_the_lead_locked(Ring *self)
{
    if (!self->has_leader && self->followers != NULL) {
        wake(self->followers);
    }
}

bool
ring_follow(struct follower *follower, int64_t until)
{
    const struct timespec left = ring_time_left(until);
    return futex(&follower->woken, FUTEX_WAIT, 0, &left) < 0 && errno == EINTR;
}

/* ---- Time -------------------------------------------------------------------------------- */

int64_t
ring_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

struct timespec
ring_time_left(int64_t deadline)
{
    int64_t left = deadline - ring_now();
    left = left > 0 ? left : 0;
    return (struct timespec){left / 1000000000, left % 1000000000};
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

/* 0 if something wakes a thread that sleeps until completions come; else -1 with an exception. */
static int
check_wakes(Ring *self)
{
    if (ring_check_thread(self) < 0) {
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
    CHAOS_POINT();
    ring_lock(self);
    int failed = self->state != RING_OPEN ? STREAM_CLOSED
                 : self->event_fd < 0     ? open_events_locked(self)
                                          : 0;
    int fd = self->epoll_fd;
    ring_unlock(self);
    return failed ? ring_raise(self, failed, "epoll_create1") : PyLong_FromLong(fd);
}

/* ---- Watches ----------------------------------------------------------------------------- */

void
watch_release(struct watch *watch)
{
    if (atomic_fetch_sub(&watch->holders, 1) == 1) {
        close(watch->event_fd);
        free(watch);
    }
}

void
watch_tell(struct watch *watch)
{
    const uint64_t one = 1;
    /* It fails only when 2**64 - 2 tellings were not heard, and then it is readable already. */
    ssize_t ignored = write(watch->event_fd, &one, sizeof(one));
    (void)ignored;
}

/* Lets go of those that no loop has any more. */
static void
forget_unwatched_locked(Ring *self)
{
    struct watch **link = &self->watches;
    while (*link != NULL) {
        struct watch *watch = *link;
        if (watch->unwatched) {
            *link = watch->next;
            watch_release(watch);
        }
        else {
            link = &watch->next;
        }
    }
}

void
ring_tell_watches_locked(Ring *self)
{
    for (struct watch *watch = self->watches; watch != NULL; watch = watch->next) {
        watch_tell(watch);
    }
}

/* A watch that the ring knows of, with a reference for the caller. 0, or a code with `watch` as it was. */
static int
make_watch_locked(Ring *self, int *arrivals, struct watch **watch)
{
    if (self->state == RING_CLOSED) {
        return STREAM_CLOSED;
    }
    forget_unwatched_locked(self);
    struct watch *made = calloc(1, sizeof(*made));
    if (made == NULL) {
        return NO_MEMORY;
    }
    const int fd = arrival_fd_locked(self);
    int failed = 0;
    if (fd < 0 || (*arrivals = fcntl(fd, F_DUPFD_CLOEXEC, 0)) < 0) {
        failed = errno;
    }
    else if ((made->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) < 0) {
        failed = errno;
        close(*arrivals);
    }
    if (failed != 0) {
        free(made);
        return failed;
    }
    made->holders = 2;
    made->next = self->watches;
    self->watches = made;
    *watch = made;
    return 0;
}

/* _watch() -> Watch */
PyObject *
ring_watch(Ring *self, PyObject *Py_UNUSED(ignored))
{
    if (check_wakes(self) < 0) {
        return NULL;
    }
    PyTypeObject *type = self->module->watch_type;
    Watch *made = (Watch *)type->tp_alloc(type, 0);
    if (made == NULL) {
        return NULL;
    }
    made->arrivals = -1;
    ring_lock(self);
    int failed = make_watch_locked(self, &made->arrivals, &made->watch);
    ring_unlock(self);
    if (failed) {
        Py_DECREF(made);
        return ring_raise(self, failed, "eventfd");
    }
    return (PyObject *)made;
}

/* The ring lets go of its part when it makes the next one. */
static void
watch_dealloc(Watch *self)
{
    PyTypeObject *type = Py_TYPE(self);
    if (self->watch != NULL) {
        self->watch->unwatched = true;
        watch_release(self->watch);
        close(self->arrivals);
    }
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *
watch_get_arrivals(const Watch *self, void *Py_UNUSED(closure))
{
    return PyLong_FromLong(self->arrivals);
}

static PyObject *
watch_get_event(const Watch *self, void *Py_UNUSED(closure))
{
    return PyLong_FromLong(self->watch->event_fd);
}

/* The ring and this object are two of the holders; the others are requests. */
static PyObject *
watch_get_requests(const Watch *self, void *Py_UNUSED(closure))
{
    const uint32_t holders = atomic_load(&self->watch->holders);
    return PyLong_FromUnsignedLong(holders > 2 ? holders - 2 : 0);
}

static PyGetSetDef watch_getset[] = {
    {"arrivals", (getter)watch_get_arrivals, NULL,
     "A descriptor that is readable while there are completions to consume.", NULL},
    {"event", (getter)watch_get_event, NULL,
     "An eventfd that is readable once something else has changed.", NULL},
    {"requests", (getter)watch_get_requests, NULL, "Requests whose future is to be set.", NULL},
    {0},
};

static PyType_Slot watch_slots[] = {
    {Py_tp_dealloc, watch_dealloc},
    {Py_tp_getset, watch_getset},
    {0, NULL},
};

PyType_Spec gdsdirect_watch_spec = {
    .name = "gdsdirect._uring_cmd.Watch",
    .basicsize = sizeof(Watch),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = watch_slots,
};
