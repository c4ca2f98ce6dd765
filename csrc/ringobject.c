/*
 * The type Ring: made, closed and collected; its methods, and what help() says of them.
 */
#include "ring.h"

#include <errno.h>
#include <limits.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "carry.h"
#include "reap.h"
#include "requestobject.h"
#include "sqe.h"
#include "submit.h"

#define MOST_DEPTH 32768             /* IORING_MAX_ENTRIES */
#define REGISTERED_BYTES (1ul << 30) /* of one registered buffer at most (io_uring/rsrc.c) */
#define CANCEL_GRACE INT64_C(1000000000)

/* ---- Making a ring ----------------------------------------------------------------------- */

static uint32_t
power_of_two(uint32_t at_least)
{
    uint32_t power = 1;
    while (power < at_least) {
        power *= 2;
    }
    return power;
}

/* ---- Idle rings -------------------------------------------------------------------------- */

#define IDLE_DEPTH 128 /* the default */

/* In a fork's child the parent's rings mean nothing. */
static void
idle_of_this_process_locked(struct idle_rings *idle)
{
    if (idle->process != getpid()) {
        idle->process = getpid();
        idle->count = 0;
    }
}

static bool
take_idle(struct idle_rings *idle, struct io_uring *ring)
{
    pthread_mutex_lock(&idle->lock);
    idle_of_this_process_locked(idle);
    const bool found = idle->count > 0;
    if (found) {
        *ring = idle->rings[--idle->count];
    }
    pthread_mutex_unlock(&idle->lock);
    return found;
}

/* False: there are enough, or no memory for it. */
static bool
keep_idle(struct idle_rings *idle, const struct io_uring *ring)
{
    pthread_mutex_lock(&idle->lock);
    idle_of_this_process_locked(idle);
    if (idle->rings == NULL) {
        idle->rings = calloc(IDLE_RINGS, sizeof(*idle->rings));
    }
    const bool kept = idle->rings != NULL && idle->count < IDLE_RINGS;
    if (kept) {
        idle->rings[idle->count++] = *ring;
    }
    pthread_mutex_unlock(&idle->lock);
    return kept;
}

void
gdsdirect_idle_rings_free(struct idle_rings *idle)
{
    while (idle->count > 0 && idle->process == getpid()) {
        io_uring_queue_exit(&idle->rings[--idle->count]);
    }
    free(idle->rings);
    pthread_mutex_destroy(&idle->lock);
}

/* Memory of rings that have ended comes back a moment later: their end is left to a thread of the kernel's. */
static int
set_up_patiently(uint32_t entries, struct io_uring *ring, struct io_uring_params *params)
{
    int result = io_uring_queue_init_params(entries, ring, params);
    for (unsigned ms = 1; result == -ENOMEM && ms <= 256; ms *= 2) {
        const struct timespec pause = {.tv_nsec = ms * 1000000L};
        struct io_uring_params again = {
            .flags = params->flags,
            .cq_entries = params->cq_entries,
            .sq_thread_idle = params->sq_thread_idle,
        };
        nanosleep(&pause, NULL);
        *params = again;
        result = io_uring_queue_init_params(entries, ring, params);
    }
    return result;
}

/* Sets up the kernel's side. 0 or a positive errno. */
static int
open_ring(Ring *self, uint32_t depth)
{
    /* The CQ has room for every command, and for as many CQEs that call the leader. With a polling
     * thread a slot can be free before its SQE is: one entry more is for the ring's own. */
    const bool polled = self->setup_flags & IORING_SETUP_SQPOLL;
    uint32_t entries = power_of_two(depth + (polled && depth < MOST_DEPTH ? 1 : 0));
    struct io_uring_params params = {
        .flags = self->setup_flags | IORING_SETUP_SQE128 | IORING_SETUP_CQE32 |
                 IORING_SETUP_CQSIZE | IORING_SETUP_SUBMIT_ALL,
        .cq_entries = 2 * entries,
        .sq_thread_idle = 100, /* ms */
    };
    self->fork_mark = mmap(NULL, 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (self->fork_mark == MAP_FAILED) {
        self->fork_mark = NULL;
        return errno;
    }
    *self->fork_mark = 1;
    if (madvise(self->fork_mark, 1, MADV_WIPEONFORK) < 0) {
        return errno;
    }
    if (!inflight_init(&self->table, depth)) {
        return ENOMEM;
    }
    if (self->shared && depth == IDLE_DEPTH && take_idle(&self->module->idle, &self->ring)) {
        return 0;
    }
    int result;
    Py_BEGIN_ALLOW_THREADS
    result = set_up_patiently(entries, &self->ring, &params);
    Py_END_ALLOW_THREADS
    if (result < 0) {
        self->ring.ring_fd = -1;
    }
    return -result;
}

/* Registers what makes commands cheaper, and isn't necessary: a table of files, so that the kernel takes
 * no reference to the file for each command, and the ring's own descriptor, which then is good for one
 * thread. */
static void
register_what_works(Ring *self)
{
    /* A shared ring reads few times of each file, which is to be closed when its user closes it. */
    self->registers_files =
        !self->shared && io_uring_register_files_sparse(&self->ring, REGISTERED_FILES) == 0;
    if (self->setup_flags & IORING_SETUP_SINGLE_ISSUER &&
        io_uring_register_ring_fd(&self->ring) == 1) {
        self->enter_flags = IORING_ENTER_REGISTERED_RING;
    }
}

/* Registers the memory with the kernel, which then pins its pages once and not for every command.
 * 0 or a positive errno. */
static int
register_memory(Ring *self)
{
    const size_t nbytes = (size_t)self->memory->nbytes;
    const size_t count = (nbytes + REGISTERED_BYTES - 1) / REGISTERED_BYTES;
    if (count >= NOT_REGISTERED) {
        return ENOMEM;
    }
    /* One more, for bounce slots: register_bounce_locked of carry.c fills it. */
    struct iovec *pieces = calloc(count + 1, sizeof(*pieces));
    if (pieces == NULL) {
        return ENOMEM;
    }
    for (size_t i = 0; i < count; i++) {
        const size_t offset = i * REGISTERED_BYTES;
        pieces[i].iov_base = self->memory->address + offset;
        pieces[i].iov_len = nbytes - offset < REGISTERED_BYTES ? nbytes - offset : REGISTERED_BYTES;
    }
    int result;
    Py_BEGIN_ALLOW_THREADS
    result = io_uring_register_buffers(&self->ring, pieces, (unsigned)count + 1);
    Py_END_ALLOW_THREADS
    free(pieces);
    if (result == 0) {
        self->registered = (uint32_t)count;
        self->registered_most = UINT32_MAX;
    }
    return -result;
}

static Ring *
ring_alloc(PyTypeObject *type, struct module_state *module, PyObject *buffer)
{
    Ring *self = (Ring *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    self->module = module;
    self->state = RING_CLOSED;
    self->table = INFLIGHT_EMPTY;
    self->ring.ring_fd = self->event_fd = self->epoll_fd = self->arrival_fd = -1;
    self->owner_thread = pthread_self();
    self->bounce.registered = NOT_REGISTERED;
    pthread_mutex_init(&self->lock, NULL);
    self->memory = (Memory *)Py_NewRef(buffer);
    if (PyObject_GetBuffer(buffer, &self->export, PyBUF_WRITABLE) < 0) {
        Py_CLEAR(self);
    }
    return self;
}

static PyObject *
ring_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"buffer", "depth",    "single_thread", "sqpoll",
                            "iopoll", "register", "_lender",       NULL};
    PyObject *module = PyType_GetModuleByDef(type, &gdsdirect_uring_cmd_module);
    PyObject *buffer, *registering = Py_None, *lender = Py_None;
    Py_ssize_t depth = 128;
    int single_thread = 0, sqpoll = 0, iopoll = 0;
    if (module == NULL || !PyArg_ParseTupleAndKeywords(args, kwargs, "O|n$pppOO:AsyncUringStream",
                                                       names, &buffer, &depth, &single_thread,
                                                       &sqpoll, &iopoll, &registering, &lender)) {
        return NULL;
    }
    struct module_state *state = PyModule_GetState(module);
    if (!PyObject_TypeCheck(buffer, state->memory_type)) {
        return PyErr_Format(PyExc_TypeError,
                            "buffer must be a GpuMappedBuffer, not '%.100s': see its from_object",
                            Py_TYPE(buffer)->tp_name);
    }
    if (depth < 1 || depth > MOST_DEPTH) {
        return PyErr_Format(PyExc_ValueError, "depth is %zd, outside 1..%d", depth, MOST_DEPTH);
    }
    int demanded = registering == Py_None ? 0 : PyObject_IsTrue(registering);
    if (demanded < 0) {
        return NULL;
    }
    ring_collect_given_up(state);
    Ring *self = ring_alloc(type, state, buffer);
    if (self == NULL) {
        return NULL;
    }
    self->shared = lender != Py_None;
    if (self->shared && (self->lender = PyWeakref_NewRef(lender, NULL)) == NULL) {
        Py_DECREF(self);
        return NULL;
    }
    self->setup_flags = (single_thread ? IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN |
                                             IORING_SETUP_TASKRUN_FLAG
                                       : 0) |
                        (sqpoll ? IORING_SETUP_SQPOLL : 0) | (iopoll ? IORING_SETUP_IOPOLL : 0);
    int failed = open_ring(self, (uint32_t)depth);
    const char *call = "io_uring_setup";
    if (failed == 0) {
        self->register_errno = registering == Py_False ? ENOBUFS : register_memory(self);
        failed = demanded ? self->register_errno : 0;
        call = "IORING_REGISTER_BUFFERS";
    }
    if (failed != 0) {
        /* stream.py, which knows what was asked for, has the words. */
        PyObject *values = Py_BuildValue("(is)", failed, call);
        if (values != NULL) {
            PyErr_SetObject(PyExc_OSError, values);
            Py_DECREF(values);
        }
        Py_CLEAR(self);
        return NULL;
    }
    register_what_works(self);
    self->state = RING_OPEN;
    return (PyObject *)self;
}

/* ---- Closing ----------------------------------------------------------------------------- */

/* What a ring gives back at its end. */
struct remains {
    struct io_uring ring;
    bool has_files;
    bool has_buffers;
    int event_fd;
    int epoll_fd;
    int arrival_fd;
    struct watch *watches;
    Py_buffer export;
    Py_buffer bounce;
};

/* Closes the ring and takes all that it has to give back out of it, in one step: whoever comes after this
 * finds a ring that is closed, and nothing of it. Nothing is in flight. */
static void
take_remains_locked(Ring *self, struct remains *remains)
{
    CHAOS_POINT();
    self->closer = pthread_self();
    self->state = RING_CLOSED;
    while (self->table.ready > 0) { /* that nobody took */
        holder_drop(&self->table, outcome_at(&self->table, --self->table.ready)->holder, 1);
    }
    holders_unregister(&self->table);
    *remains = (struct remains){
        .ring = self->ring,
        .has_files = self->registers_files,
        .has_buffers = self->registered > 0 || self->bounce.registered != NOT_REGISTERED,
        .event_fd = self->event_fd,
        .epoll_fd = self->epoll_fd,
        .arrival_fd = self->arrival_fd,
        .watches = self->watches,
        .export = self->export,
        .bounce = self->bounce.export,
    };
    self->watches = NULL;
    self->ring.ring_fd = self->event_fd = self->epoll_fd = self->arrival_fd = -1;
    self->export = self->bounce.export = (Py_buffer){0};
}

static void
close_descriptor(int fd)
{
    if (fd >= 0) {
        close(fd);
    }
}

/* Gives it all back, without the lock: the memory's end can run Python code. */
static void
give_back(Ring *self, struct remains *remains)
{
    struct io_uring *ring = &remains->ring;
    CHAOS_POINT();
    if (ring->ring_fd >= 0) {
        const bool forked = ring_is_forked(self);
        if (self->enter_flags != 0 &&
            (forked || !pthread_equal(self->owner_thread, pthread_self()))) {
            /* A registered descriptor's index is its thread's; here it may be another ring's, which
             * liburing (2.4) would have give back its files and buffers. No thread has this one, and
             * the owner's end frees its own. */
            ring->enter_ring_fd = INT_MAX;
        }
        /* A kernel thread lets go of what is left to the ring's end, some time after it. */
        if (remains->has_files && !forked) {
            io_uring_unregister_files(ring);
        }
        const bool unpinned =
            !remains->has_buffers || (!forked && io_uring_unregister_buffers(ring) == 0);
        if (self->shared && self->table.depth == IDLE_DEPTH && unpinned && !forked &&
            remains->watches == NULL && remains->epoll_fd < 0 && io_uring_cq_ready(ring) == 0 &&
            keep_idle(&self->module->idle, ring)) {
            ring->ring_fd = -1;
        }
        if (ring->ring_fd >= 0) {
            io_uring_queue_exit(ring);
        }
    }
    while (remains->watches != NULL) {
        struct watch *watch = remains->watches;
        remains->watches = watch->next;
        watch_tell(watch); /* its loop finds that the ring is closed */
        watch_release(watch);
    }
    close_descriptor(remains->event_fd);
    close_descriptor(remains->epoll_fd);
    close_descriptor(remains->arrival_fd);
    PyBuffer_Release(&remains->bounce);
    PyBuffer_Release(&remains->export);
    atomic_store(&self->given_back, true);
}

/* Another thread may have closed the ring, and may not have given back all of it yet. -1 with an exception
 * of a signal handler's. */
static int
wait_until_given_back(const Ring *self)
{
    const struct timespec moment = {.tv_nsec = 50000};
    while (!atomic_load(&self->given_back) && !pthread_equal(self->closer, pthread_self())) {
        Py_BEGIN_ALLOW_THREADS
        nanosleep(&moment, NULL);
        Py_END_ALLOW_THREADS
        if (PyErr_CheckSignals() < 0) {
            return -1;
        }
    }
    return 0;
}

static int
drain_locked(Ring *self, int64_t deadline)
{
    while (inflight_count(&self->table) > 0 || self->has_leader) {
        if (ring_now() >= deadline) {
            return ETIME;
        }
        int result = ring_wait_locked(self, inflight_count(&self->table), deadline);
        if (result != DONE || self->state == RING_CLOSED) {
            return result;
        }
    }
    return DONE;
}

/* Refuses new commands, wakes everyone who waits, and waits for what is in flight. When time is up,
 * cancels what can be cancelled and waits a little longer. */
static int
close_locked(Ring *self, int64_t deadline)
{
    self->state = RING_CLOSING;
    CHAOS_POINT();
    ring_wake_all_locked(self);
    ring_tell_watches_locked(self);
    ring_reap_locked(self);
    if (self->has_leader && !self->leader_called) {
        ring_call_leader_locked(self);
    }
    int result = drain_locked(self, deadline);
    if (result == ETIME) {
        ring_send_own_locked(self, IORING_OP_ASYNC_CANCEL, 1);
        result = drain_locked(self, ring_now() + CANCEL_GRACE);
    }
    return result;
}

static PyObject *
ring_close(Ring *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"timeout", NULL};
    PyObject *timeout = Py_None;
    int64_t deadline;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|O:close", names, &timeout) ||
        ring_deadline(timeout, &deadline) < 0) {
        return NULL;
    }
    if (self->state == RING_CLOSED) {
        return wait_until_given_back(self) < 0 ? NULL : Py_NewRef(Py_None);
    }
    if (ring_check_thread(self) < 0) {
        return NULL;
    }
    struct remains remains;
    ring_lock(self);
    int result = self->state != RING_CLOSED ? close_locked(self, deadline) : DONE;
    uint32_t left = inflight_count(&self->table);
    const bool last = result == DONE && self->state != RING_CLOSED;
    if (last) {
        take_remains_locked(self, &remains);
    }
    else if (result == ETIME) {
        request_adopt_locked(self);
    }
    ring_unlock(self);
    if (last) {
        give_back(self, &remains);
    }
    if (result == ETIME) {
        return PyErr_Format(PyExc_TimeoutError,
                            "%u commands are still in flight and can't be cancelled: the stream "
                            "takes no more, call close() again to wait for them",
                            left);
    }
    if (result != DONE) {
        return ring_raise(self, result, "io_uring_enter");
    }
    return wait_until_given_back(self) < 0 ? NULL : Py_NewRef(Py_None);
}

/* _collect(): takes in what has come. */
static PyObject *
ring_collect(Ring *self, PyObject *Py_UNUSED(ignored))
{
    if (ring_check_process(self) < 0) {
        return NULL;
    }
    ring_lock(self);
    ring_fetch_locked(self);
    ring_unlock(self);
    Py_RETURN_NONE;
}

/* _close_if_idle(): closes a ring that no request needs; else it stays open, and this is False. */
static PyObject *
ring_close_if_idle(Ring *self, PyObject *Py_UNUSED(ignored))
{
    struct remains remains;
    if (ring_check_process(self) < 0) {
        return NULL;
    }
    ring_lock(self);
    if (self->state == RING_OPEN) {
        ring_fetch_locked(self);
    }
    const bool idle = self->state == RING_OPEN && self->requests == 0 && !self->has_leader &&
                      inflight_count(&self->table) == 0 && self->table.ready == 0;
    const bool closed = idle || self->state == RING_CLOSED;
    if (idle) {
        ring_wake_all_locked(self);
        take_remains_locked(self, &remains);
    }
    ring_unlock(self);
    if (idle) {
        give_back(self, &remains);
    }
    return PyBool_FromLong(closed);
}

/* ---- Collecting -------------------------------------------------------------------------- */

static int
ring_traverse(Ring *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    /* With commands in flight the kernel owns the memory: unvisited, it and all that keeps it
     * mapped look alive to the collector, which so can't free them in a cycle with the stream. */
    if (inflight_count(&self->table) == 0) {
        Py_VISIT(self->memory);
        Py_VISIT(self->export.obj);
        Py_VISIT(self->bounce.memory);
        Py_VISIT(self->bounce.export.obj);
    }
    return 0; /* sources hold no Python objects that could be part of a cycle */
}

static void
ring_finalize(Ring *self)
{
    if (self->state == RING_CLOSED || ring_is_forked(self) || self->shared) {
        return; /* a shared one is not its user's to close, and has nothing in flight here */
    }
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    ring_lock(self);
    ring_reap_locked(self);
    uint32_t left = inflight_count(&self->table);
    request_adopt_locked(self); /* which then have this ring, and let go of it when they are back */
    ring_unlock(self);
    int failed = left == 0
                     ? PyErr_ResourceWarning((PyObject *)self, 1, "unclosed stream %R", self)
                     : PyErr_ResourceWarning((PyObject *)self, 1,
                                             "stream collected with %u commands in flight: its "
                                             "memory is not freed before they are back; close() it",
                                             left);
    if (failed) {
        PyErr_WriteUnraisable((PyObject *)self);
    }
    PyErr_Restore(type, value, traceback);
}

/* Frees a ring that no thread can be waiting on. With commands in flight the ring, the memory and its
 * owner are left to the kernel for good: it may write there as long as the process lives. */
static void
ring_dealloc(Ring *self)
{
    PyTypeObject *type = Py_TYPE(self);
    if (PyObject_CallFinalizerFromDealloc((PyObject *)self) < 0) {
        return;
    }
    PyObject_GC_UnTrack(self);
    if (inflight_count(&self->table) == 0 || (self->fork_mark != NULL && ring_is_forked(self))) {
        struct remains remains;
        take_remains_locked(self, &remains);
        give_back(self, &remains);
        Source *source;
        while ((source = inflight_finished_source(&self->table)) != NULL) {
            Py_DECREF(source);
        }
        Py_XDECREF(self->bounce.memory);
        Py_XDECREF(self->memory);
    }
    Py_XDECREF(self->lender);
    if (self->fork_mark != NULL) {
        munmap(self->fork_mark, 1);
    }
    inflight_destroy(&self->table);
    pthread_mutex_destroy(&self->lock);
    type->tp_free(self);
    Py_DECREF(type);
}

/* ---- Attributes -------------------------------------------------------------------------- */

/* _counters() -> ((submitted, registered, completed, failed, nbytes), …), by way. */
static PyObject *
ring_counters(Ring *self, PyObject *Py_UNUSED(ignored))
{
    struct counters counters[WAYS];
    if (ring_check_process(self) < 0) {
        return NULL;
    }
    ring_lock(self);
    memcpy(counters, self->counters, sizeof(counters));
    ring_unlock(self);

    PyObject *ways = PyTuple_New(WAYS);
    for (int i = 0; ways != NULL && i < WAYS; i++) {
        const struct counters *way = &counters[i];
        PyObject *item =
            Py_BuildValue("(KKKKK)", (unsigned long long)way->submitted,
                          (unsigned long long)way->registered, (unsigned long long)way->completed,
                          (unsigned long long)way->failed, (unsigned long long)way->nbytes);
        if (item == NULL) {
            Py_CLEAR(ways);
            break;
        }
        PyTuple_SET_ITEM(ways, i, item);
    }
    return ways;
}

static PyObject *
ring_get_inflight(Ring *self, void *Py_UNUSED(closure))
{
    if (ring_check_process(self) < 0) {
        return NULL;
    }
    ring_lock(self);
    size_t inflight = inflight_count(&self->table) + self->table.ready;
    ring_unlock(self);
    return PyLong_FromSize_t(inflight);
}

static PyObject *
ring_get_closed(const Ring *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(self->state != RING_OPEN);
}

static PyObject *
ring_get_depth(const Ring *self, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLong(self->table.depth);
}

static PyObject *
ring_get_registered(const Ring *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(self->registered > 0);
}

static PyObject *
ring_get_register_errno(const Ring *self, void *Py_UNUSED(closure))
{
    return PyLong_FromLong(self->register_errno);
}

static PyObject *
ring_get_has_bounce(Ring *self, void *Py_UNUSED(closure))
{
    if (ring_check_process(self) < 0) {
        return NULL;
    }
    ring_lock(self);
    const bool has = self->bounce.memory != NULL;
    ring_unlock(self);
    return PyBool_FromLong(has);
}

static PyGetSetDef ring_getset[] = {
    {"closed", (getter)ring_get_closed, NULL, "Whether close() was called.", NULL},
    {"depth", (getter)ring_get_depth, NULL, "Commands that the kernel has at once, at most.", NULL},
    {"inflight", (getter)ring_get_inflight, NULL,
     "Commands submitted whose completion was not handed out yet.", NULL},
    {"registered", (getter)ring_get_registered, NULL,
     "Whether the buffer is registered with the kernel.", NULL},
    {"_register_errno", (getter)ring_get_register_errno, NULL, "Why it isn't, or 0.", NULL},
    {"_has_bounce", (getter)ring_get_has_bounce, NULL, "Whether there are bounce slots.", NULL},
    {0},
};

/* ---- Type -------------------------------------------------------------------------------- */

PyDoc_STRVAR(
    passthrough_doc,
    "submit_nvme_passthrough($self, namespace, commands, *, user_data=None)\n--\n\n"
    "Submit NVMe read commands by io_uring passthrough (IORING_OP_URING_CMD); returns their\n"
    "user_data as a range, in order.\n\n"
    "namespace is a Namespace; commands a contiguous buffer of n * 64 bytes, as packed by\n"
    "encode_nvme_read_sqe. Each command is checked: its opcode and reserved bytes, its namespace\n"
    "id, its LBA range against the capacity, its length against max_transfer, its destination\n"
    "against this stream's buffer, which must hold all of it, at a multiple of 4. If one is bad,\n"
    "ValueError names it and none is submitted. More commands than the ring has room for are taken\n"
    "all the same: the call then waits for completions, which a later wait() hands out.\n\n"
    "user_data is the first command's (0..2**64-1), the next ones count up from it; by default the\n"
    "stream counts. Raises ValueError if the namespace has metadata or is closed, OSError if the\n"
    "kernel takes no more; a note on the exception says how many were submitted before.\n");

PyDoc_STRVAR(
    passthroughs_doc,
    "submit_nvme_passthroughs($self, batches, *, user_data=None)\n--\n\n"
    "Submit read commands to several namespaces; returns the user_data of each batch as a range.\n\n"
    "batches is a sequence of (namespace, commands), each as submit_nvme_passthrough takes them, and\n"
    "checked so: one bad command, and none of any batch is submitted. Where they don't fit the ring\n"
    "together, each namespace has its share of the slots, refilled as its own commands complete, so\n"
    "that every drive's queue is kept full, and a slow drive holds up no other. user_data count up\n"
    "through all batches. A namespace's share is depth / number of batches with commands left.\n");

PyDoc_STRVAR(
    read_doc,
    "submit_read($self, file, file_offset, nbytes, target_offset, *, user_data=None)\n--\n\n"
    "Submit a read of a file into the buffer (IORING_OP_READ); returns its user_data.\n\n"
    "file is an object with fileno(), or a descriptor; the read goes on if it is closed meanwhile.\n"
    "file_offset, nbytes and target_offset are bytes. This is the way of files into peer memory,\n"
    "where the file must be open with O_DIRECT, and all three be multiples of the drive's block\n"
    "size. ValueError for a range outside the buffer.\n");

PyDoc_STRVAR(
    read_fixed_doc,
    "submit_read_fixed($self, file, file_offset, nbytes, target_offset, *, user_data=None)\n--\n\n"
    "Submit a read of a file into the registered buffer (IORING_OP_READ_FIXED); returns its\n"
    "user_data.\n\n"
    "As submit_read, for host memory, whose pages the kernel pinned once when the stream was made.\n"
    "OSError says why if it couldn't register the buffer: peer memory it never can.\n");

PyDoc_STRVAR(
    reads_doc,
    "submit_reads($self, file, file_offsets, nbytes, target_offsets, *, user_data=None)\n--\n\n"
    "Submit n reads of a file into the buffer in one call; returns their user_data as a range.\n\n"
    "Each as submit_read does. file_offsets and target_offsets are contiguous buffers of n 64-bit\n"
    "integers (array('Q'), NumPy), nbytes an int for all or a buffer of n 32-bit integers.\n"
    "ValueError names the first read that is outside the buffer; none is submitted then.\n");

PyDoc_STRVAR(
    reads_fixed_doc,
    "submit_reads_fixed($self, file, file_offsets, nbytes, target_offsets, *, user_data=None)\n"
    "--\n\n"
    "Submit n reads of a file into the registered buffer in one call, each as submit_read_fixed\n"
    "does; returns their user_data as a range. The arguments are those of submit_reads.\n");

PyDoc_STRVAR(
    wait_doc,
    "wait($self, /, count=1, timeout=None)\n--\n\n"
    "Wait for at least count completions and return all that are there, as a list of Completion.\n\n"
    "Fewer come back when timeout (seconds) has passed, or when nothing is left in flight. What is\n"
    "not returned is not lost. Signal handlers run meanwhile; what they raise ends the wait.\n");

PyDoc_STRVAR(poll_doc, "poll($self, /)\n--\n\n"
                       "The completions that are there, without waiting.\n");

PyDoc_STRVAR(
    wait_into_doc,
    "wait_into($self, out, count=1, timeout=None)\n--\n\n"
    "Wait for at least count completions and write all that fit into out; returns how many.\n\n"
    "out is a writable buffer of 16-byte records, COMPLETION_FORMAT: user_data (uint64), the\n"
    "kernel's result (int32: negative errno; for passthrough else an NVMe status, 0 is success; for\n"
    "file reads else bytes), bytes read (uint32). Fewer than count when timeout (seconds) has\n"
    "passed or nothing is left in flight. ValueError if count records don't fit.\n");

PyDoc_STRVAR(
    close_doc,
    "close($self, /, timeout=None)\n--\n\n"
    "Take no more commands, wait for those in flight, and give everything back.\n\n"
    "Threads that wait get ValueError. Completions that nobody took are dropped. When timeout\n"
    "(seconds) has passed, what can be cancelled is cancelled; TimeoutError if commands are in\n"
    "flight even then: the memory stays held, and close() can be called again.\n");

PyDoc_STRVAR(
    fileno_doc,
    "fileno($self, /)\n--\n\n"
    "A descriptor that is readable while completions wait, for select, poll and asyncio.\n");

static PyMethodDef ring_methods[] = {
    {"submit_nvme_passthrough", KEYWORDS(ring_submit_nvme_passthrough),
     METH_FASTCALL | METH_KEYWORDS, passthrough_doc},
    {"submit_nvme_passthroughs", KEYWORDS(ring_submit_nvme_passthroughs),
     METH_VARARGS | METH_KEYWORDS, passthroughs_doc},
    {"submit_read", KEYWORDS(ring_submit_read), METH_VARARGS | METH_KEYWORDS, read_doc},
    {"submit_read_fixed", KEYWORDS(ring_submit_read_fixed), METH_VARARGS | METH_KEYWORDS,
     read_fixed_doc},
    {"submit_reads", KEYWORDS(ring_submit_reads), METH_VARARGS | METH_KEYWORDS, reads_doc},
    {"submit_reads_fixed", KEYWORDS(ring_submit_reads_fixed), METH_VARARGS | METH_KEYWORDS,
     reads_fixed_doc},
    {"wait_into", KEYWORDS(ring_wait_into), METH_FASTCALL | METH_KEYWORDS, wait_into_doc},
    {"close", KEYWORDS(ring_close), METH_VARARGS | METH_KEYWORDS, close_doc},
    {"fileno", (PyCFunction)ring_fileno, METH_NOARGS, fileno_doc},
    {"wait", KEYWORDS(ring_wait), METH_VARARGS | METH_KEYWORDS, wait_doc},
    {"poll", (PyCFunction)ring_poll, METH_NOARGS, poll_doc},
    {"_take_one", (PyCFunction)ring_take_one, METH_NOARGS, NULL},
    {"_watch", (PyCFunction)ring_watch, METH_NOARGS, NULL},
    {"_arrived", (PyCFunction)ring_arrived, METH_O, NULL},
    {"_look", (PyCFunction)ring_look, METH_NOARGS, NULL},
    {"_request", FASTCALL(ring_request), METH_FASTCALL, NULL},
    {"_lend_bounce", (PyCFunction)ring_lend_bounce, METH_O, NULL},
    {"_carry_out", FASTCALL(ring_carry_out), METH_FASTCALL, NULL},
    {"_start", (PyCFunction)ring_start, METH_O, NULL},
    {"_read", FASTCALL(ring_read), METH_FASTCALL, NULL},
    {"_begin", FASTCALL(ring_begin), METH_FASTCALL, NULL},
    {"_clear_the_way", (PyCFunction)ring_method_clear_the_way, METH_NOARGS, NULL},
    {"_in_the_way", (PyCFunction)ring_method_in_the_way, METH_NOARGS, NULL},
    {"_collect", (PyCFunction)ring_collect, METH_NOARGS, NULL},
    {"_close_if_idle", (PyCFunction)ring_close_if_idle, METH_NOARGS, NULL},
    {"_counters", (PyCFunction)ring_counters, METH_NOARGS, NULL},
    {0},
};

static PyType_Slot ring_slots[] = {
    {Py_tp_new, ring_new},
    {Py_tp_dealloc, ring_dealloc},
    {Py_tp_finalize, ring_finalize},
    {Py_tp_traverse, ring_traverse},
    {Py_tp_methods, ring_methods},
    {Py_tp_getset, ring_getset},
    {0, NULL},
};

PyType_Spec gdsdirect_ring_spec = {
    .name = "gdsdirect._uring_cmd.Ring",
    .basicsize = sizeof(Ring),
    .flags =
        Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = ring_slots,
};
