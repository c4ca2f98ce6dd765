/*
 * The type Request: made, carried out, awaited, given up. request.h has what it goes through.
 *
 * Whoever lets go of a Request whose reads are in flight gives them up: so an exception can come
 * anywhere in the Python code that has it, and nothing is lost or forgotten.
 */
#include "requestobject.h"

#include <errno.h>
#include <unistd.h>

#include "arrays.h"
#include "carry.h"
#include "check.h"
#include "reap.h"

typedef struct {
    PyObject_HEAD
    Ring *ring;
    struct request *request;
} Request;

/* ---- Making ------------------------------------------------------------------------------ */

/* References to what the reads are of: one Source, or a tuple of one for each. -1 with TypeError. */
static int
take_sources(Ring *self, struct request *request, PyObject *given)
{
    for (size_t i = 0; i < request->source_count; i++) {
        PyObject *source = PyTuple_Check(given) ? PyTuple_GET_ITEM(given, (Py_ssize_t)i) : given;
        if (!Py_IS_TYPE(source, self->module->source_type)) {
            PyErr_Format(PyExc_TypeError, "source %zu must be a Source, not '%.100s'", i,
                         Py_TYPE(source)->tp_name);
            return -1;
        }
        request->sources[i] = (Source *)Py_NewRef(source);
        if (request->source_count > 1 && request->sources[i]->is_nvme) {
            PyErr_Format(PyExc_TypeError, "source %zu of several is a namespace", i);
            return -1;
        }
    }
    return 0;
}

/* Takes the buffer itself, which a shared ring may outlive. -1 with ValueError: it is gone. */
static int
borrow_memory(Ring *self, struct request *request)
{
    if (self->lender == NULL) {
        return 0;
    }
    request->lent = (Memory *)compat_weakref_get(self->lender);
    if (request->lent == NULL) {
        PyErr_SetString(PyExc_ValueError, "the buffer is gone");
        return -1;
    }
    return 0;
}

static PyObject *
request_object(Ring *self, struct request *request)
{
    PyTypeObject *type = self->module->request_type;
    Request *made = (Request *)type->tp_alloc(type, 0);
    if (made == NULL) {
        request_free(request);
        return NULL;
    }
    made->ring = (Ring *)Py_NewRef((PyObject *)self);
    made->request = request;
    request->owned = true;
    return (PyObject *)made;
}

static struct request *
make_request(Ring *self, PyObject *sources, const struct read_arrays *arrays,
             const struct wanted_arrays *wanted, bool fixed)
{
    const size_t count = (size_t)arrays->offsets.len / 8;
    const bool several = PyTuple_Check(sources);
    if (several && (size_t)PyTuple_GET_SIZE(sources) != count) {
        PyErr_Format(PyExc_ValueError, "%zd sources and %zu reads: give one of each",
                     PyTuple_GET_SIZE(sources), count);
        return NULL;
    }
    if (wanted != NULL && (self->bounce.memory == NULL || (size_t)wanted->skips.len / 4 != count ||
                           (size_t)wanted->sizes.len / 4 != count)) {
        PyErr_SetString(PyExc_ValueError,
                        "give memory for bounce slots, and as many of all arrays");
        return NULL;
    }
    struct request *request = request_new(count, several ? count : 1, wanted != NULL);
    if (request == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    if (take_sources(self, request, sources) < 0 || borrow_memory(self, request) < 0 ||
        check_request(self, request, arrays, wanted, fixed) < 0) {
        request_free(request);
        return NULL;
    }
    if (count > 0) {
        request->way = way_of(request->sources[0], fixed);
    }
    return request;
}

/* _request(sources, offsets, sizes, targets, fixed, skips=None, wanted=None) -> Request, checked. With the
 * last two, reads into bounce slots: of each so many bytes from its byte `skip` on go to `target`. */
PyObject *
ring_request(Ring *self, PyObject *const *args, Py_ssize_t nargs)
{
    struct read_arrays arrays = {0};
    struct wanted_arrays wanted = {0};
    struct request *request = NULL;
    if (nargs != 5 && nargs != 7) {
        PyErr_SetString(PyExc_TypeError, "_request takes 5 or 7 arguments");
        return NULL;
    }
    const int fixed = PyObject_IsTrue(args[4]);
    if (fixed < 0 || ring_check_caller(self) < 0) {
        return NULL;
    }
    if (read_arrays_get(self, &arrays, args[1], args[2], args[3]) == 0 &&
        (nargs == 5 || (get_integers(args[5], "skips", 4, &wanted.skips) == 0 &&
                        get_integers(args[6], "wanted", 4, &wanted.sizes) == 0))) {
        request = make_request(self, args[0], &arrays, nargs == 7 ? &wanted : NULL, fixed);
    }
    PyBuffer_Release(&wanted.skips);
    PyBuffer_Release(&wanted.sizes);
    read_arrays_release(&arrays);
    return request != NULL ? request_object(self, request) : NULL;
}

/* _lend_bounce(memory): for reads into bounce slots; nothing if there is some already. */
PyObject *
ring_lend_bounce(Ring *self, PyObject *object)
{
    Py_buffer export;
    if (!PyObject_TypeCheck(object, self->module->memory_type)) {
        PyErr_SetString(PyExc_TypeError, "memory must be a Memory");
        return NULL;
    }
    if (ring_check_caller(self) < 0 || PyObject_GetBuffer(object, &export, PyBUF_WRITABLE) < 0) {
        return NULL;
    }
    Memory *memory = (Memory *)Py_NewRef(object);
    int result = DONE;
    if (export.len < (Py_ssize_t)(BOUNCE_SLOTS * BOUNCE_SLOT_BYTES)) {
        PyErr_Format(PyExc_ValueError, "%zd bytes are less than %u slots of %u", export.len,
                     BOUNCE_SLOTS, BOUNCE_SLOT_BYTES);
        result = RAISED;
    }
    else {
        ring_lock(self);
        result = self->state == RING_OPEN ? DONE : STREAM_CLOSED;
        if (result == DONE) {
            request_lend_bounce_locked(self, &memory, &export);
        }
        ring_unlock(self);
    }
    Py_XDECREF(memory);
    PyBuffer_Release(&export);
    if (result != DONE) {
        return ring_raise(self, result, NULL);
    }
    Py_RETURN_NONE;
}

/* ---- In the way -------------------------------------------------------------------------- */

/* _clear_the_way(): waits until nothing that was given up writes into the memory any more. */
PyObject *
ring_method_clear_the_way(Ring *self, PyObject *Py_UNUSED(ignored))
{
    const int result = ring_clear_the_way(self, NO_DEADLINE);
    if (result != DONE) {
        return ring_raise(self, result, "io_uring_enter");
    }
    Py_RETURN_NONE;
}

/* _in_the_way(): a ring that has something given up which may write into the memory, or None. */
PyObject *
ring_method_in_the_way(Ring *self, PyObject *Py_UNUSED(ignored))
{
    Ring *busy = request_in_the_way(self);
    return busy != NULL ? (PyObject *)busy : Py_NewRef(Py_None);
}

/* ---- Carrying out ------------------------------------------------------------------------ */

static inline struct request *
request_at(PyObject *requests, Py_ssize_t index)
{
    return ((Request *)PyTuple_GET_ITEM(requests, index))->request;
}

static bool
has_unstarted(PyObject *requests)
{
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(requests); i++) {
        if (!request_at(requests, i)->started) {
            return true;
        }
    }
    return false;
}

/* Checks that a tuple has requests of this ring alone. -1 with TypeError. */
static int
check_requests(Ring *self, PyObject *requests)
{
    if (!PyTuple_Check(requests)) {
        PyErr_SetString(PyExc_TypeError, "requests must be a tuple");
        return -1;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(requests); i++) {
        const PyObject *each = PyTuple_GET_ITEM(requests, i);
        if (!Py_IS_TYPE(each, self->module->request_type) || ((Request *)each)->ring != self) {
            PyErr_Format(PyExc_TypeError, "request %zd is none of this ring's", i);
            return -1;
        }
    }
    /* What is started keeps the ring open as long as it is in flight. */
    return has_unstarted(requests) ? ring_check_caller(self) : ring_check_thread(self);
}

/* Starts those that are not started yet, and sends what there is room for. `failed` is the index of the one
 * that a code other than DONE is about. */
static int
start_all_locked(Ring *self, PyObject *requests, Py_ssize_t *failed)
{
    int result = DONE;
    const Py_ssize_t n = PyTuple_GET_SIZE(requests);
    for (*failed = 0; result == DONE && *failed < n; ++*failed) {
        struct request *request = request_at(requests, *failed);
        if (!request->started) {
            result = request_start_locked(self, request);
        }
    }
    --*failed;
    if (result == DONE) {
        Py_BEGIN_ALLOW_THREADS
        request_pump_locked(self);
        Py_END_ALLOW_THREADS
    }
    return result;
}

/* The exception for a request that could not be started or waited for. Returns NULL. */
static PyObject *
raise_unstarted(const Ring *self, int result, const struct request *request)
{
    if (result != SOURCE_IS_CLOSED) {
        return ring_raise(self, result, "io_uring_enter");
    }
    const Source *closed = request->sources[0];
    for (size_t i = 0; i < request->source_count && !source_is_closed(closed); i++) {
        closed = request->sources[i];
    }
    return gdsdirect_source_raise_closed(closed);
}

static void
give_up_all_locked(Ring *self, PyObject *requests)
{
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(requests); i++) {
        request_give_up_locked(self, request_at(requests, i));
    }
}

/* Waits for what is in the way, starts all, and waits until all have finished; or gives them up, unless they
 * are to be kept. */
static int
carry_out(Ring *self, PyObject *requests, int64_t deadline, bool keep, Py_ssize_t *failed)
{
    const Py_ssize_t n = PyTuple_GET_SIZE(requests);
    int result = has_unstarted(requests) ? ring_clear_the_way(self, deadline) : DONE;
    *failed = 0;
    ring_lock(self);
    if (result == DONE) {
        result = start_all_locked(self, requests, failed);
    }
    for (Py_ssize_t i = 0; result == DONE && i < n; i++) {
        result = ring_finish_locked(self, request_at(requests, i), deadline);
    }
    if (result != DONE && !keep) {
        give_up_all_locked(self, requests);
    }
    ring_unlock(self);
    return result;
}

/* _carry_out(requests, deadline, give_up=True): starts those of the tuple that aren't started, and waits until
 * all have finished. After an exception all of them are given up; with give_up=False they stay as they are.
 * `deadline` is a moment of time.monotonic_ns(), or None; TimeoutError when it has come. */
PyObject *
ring_carry_out(Ring *self, PyObject *const *args, Py_ssize_t nargs)
{
    int64_t deadline = NO_DEADLINE;
    Py_ssize_t failed;
    if (nargs != 2 && nargs != 3) {
        PyErr_SetString(PyExc_TypeError, "_carry_out takes requests, a deadline and give_up");
        return NULL;
    }
    if (args[1] != Py_None) {
        deadline = PyLong_AsLongLong(args[1]);
        if (deadline == -1 && PyErr_Occurred()) {
            return NULL;
        }
    }
    if (check_requests(self, args[0]) < 0) {
        return NULL;
    }
    const bool keep = nargs == 3 && args[2] == Py_False;
    CHAOS_POINT();
    const int result = carry_out(self, args[0], deadline, keep, &failed);
    if (result == ETIME) {
        PyErr_SetNone(PyExc_TimeoutError);
        return NULL;
    }
    if (result != DONE) {
        return raise_unstarted(self, result,
                               PyTuple_GET_SIZE(args[0]) ? request_at(args[0], failed) : NULL);
    }
    Py_RETURN_NONE;
}

/* _start(requests): starts those of the tuple that aren't started, without a wait, and returns None; or
 * starts none and returns the ring of a request that was given up, and is in the way. */
PyObject *
ring_start(Ring *self, PyObject *requests)
{
    Py_ssize_t failed;
    if (check_requests(self, requests) < 0) {
        return NULL;
    }
    Ring *busy = has_unstarted(requests) ? request_in_the_way(self) : NULL;
    if (busy != NULL) {
        return (PyObject *)busy;
    }
    ring_lock(self);
    const int result = start_all_locked(self, requests, &failed);
    if (result != DONE) {
        give_up_all_locked(self, requests);
    }
    ring_unlock(self);
    if (result != DONE) {
        return raise_unstarted(self, result, request_at(requests, failed));
    }
    Py_RETURN_NONE;
}

/* ---- A Request --------------------------------------------------------------------------- */

static void
watch_unlink_locked(struct request *request)
{
    struct request **link = &request->watch->finished;
    while (*link != NULL && *link != request) {
        link = &(*link)->next;
    }
    if (*link == request) {
        *link = request->next;
        request->told = false;
    }
}

/* The loop doesn't wait for it any more. Returns the watch, for the caller to release without the lock. */
static struct watch *
unwatch_locked(struct request *request)
{
    struct watch *watch = request->watch;
    if (watch != NULL) {
        watch_unlink_locked(request);
        request->watch = NULL;
    }
    return watch;
}

/* Nobody has the Request any more: what is in flight of it is given up. Returns the request, if it is to be
 * freed here. */
static struct request *
disown_locked(Ring *ring, struct request *request)
{
    request_give_up_locked(ring, request);
    request->owned = false;
    return request->started && request->left > 0 ? NULL : request;
}

static void
request_dealloc(Request *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    if (self->request != NULL && !ring_is_forked(self->ring)) {
        ring_lock(self->ring);
        struct watch *watch = unwatch_locked(self->request);
        struct request *freed = disown_locked(self->ring, self->request);
        ring_unlock(self->ring);
        if (watch != NULL) {
            watch_release(watch);
        }
        if (freed != NULL) {
            request_free(freed);
        }
    }
    Py_XDECREF(self->ring);
    type->tp_free(self);
    Py_DECREF(type);
}

static int
request_traverse(Request *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->ring);
    if (self->request != NULL) {
        Py_VISIT(self->request->futures);
    }
    return 0;
}

static PyObject *
request_give_up(Request *self, PyObject *Py_UNUSED(ignored))
{
    if (ring_check_process(self->ring) < 0) {
        return NULL;
    }
    ring_lock(self->ring);
    request_give_up_locked(self->ring, self->request);
    request_tell_locked(self->request); /* another task may wait for it */
    ring_unlock(self->ring);
    Py_RETURN_NONE;
}

/* attach(watch, future): once the request has finished, Ring._arrived(watch) sets the future, and others that
 * were attached with the same watch. False: it has finished. */
static PyObject *
request_attach(Request *self, PyObject *args)
{
    PyObject *watch, *future;
    if (!PyArg_ParseTuple(args, "O!O:attach", self->ring->module->watch_type, &watch, &future) ||
        ring_check_process(self->ring) < 0) {
        return NULL;
    }
    struct watch *theirs = ((Watch *)watch)->watch;
    struct request *request = self->request;
    PyObject *before = NULL, *futures = PyList_New(1);
    if (futures == NULL) {
        return NULL;
    }
    PyList_SET_ITEM(futures, 0, Py_NewRef(future));
    ring_lock(self->ring);
    const bool finished = request->started && request->left == 0;
    const bool attached =
        request->started && !finished && (request->watch == NULL || request->watch == theirs);
    bool appended = true;
    if (attached && request->watch == theirs) {
        appended = PyList_Append(request->futures, future) == 0; /* allocates, and runs nothing */
    }
    else if (attached) {
        before = request->futures;
        request->futures = futures;
        futures = NULL;
        request->watch = theirs;
        atomic_fetch_add(&theirs->holders, 1);
    }
    ring_unlock(self->ring);
    Py_XDECREF(before);
    Py_XDECREF(futures);
    if (!appended) {
        return NULL;
    }
    if (!attached && !finished) {
        PyErr_SetString(PyExc_RuntimeError, "the request isn't started, or another loop awaits it");
        return NULL;
    }
    return PyBool_FromLong(attached);
}

/* take() -> [(index, res, nbytes)] of the reads that were not whole; raises what kept others from being
 * sent. To be called once the request has finished, as often as one likes. */
static PyObject *
request_take(Request *self, PyObject *Py_UNUSED(ignored))
{
    const struct request *request = self->request;
    if (!request->started || request->left > 0 || request->given_up) {
        PyErr_SetString(PyExc_RuntimeError, request->given_up ? "the request was given up"
                                                              : "the request has not finished");
        return NULL;
    }
    if (request->error != 0) {
        return ring_raise(self->ring, request->error, "io_uring_enter");
    }
    PyObject *list = PyList_New(0);
    struct shortfall each;
    for (size_t i = request->first_short; list != NULL && i != NO_COMMAND; i = each.next) {
        each = request_short(request, i);
        PyObject *item =
            Py_BuildValue("(niI)", (Py_ssize_t)i, (int)each.res, (unsigned)each.nbytes);
        if (item == NULL || PyList_Append(list, item) < 0) {
            Py_CLEAR(list);
        }
        Py_XDECREF(item);
    }
    return list;
}

static PyObject *
request_get_finished(const Request *self, void *Py_UNUSED(closure))
{
    ring_lock(self->ring);
    const bool finished = self->request->started && self->request->left == 0;
    ring_unlock(self->ring);
    return PyBool_FromLong(finished);
}

static PyObject *
request_get_ring(const Request *self, void *Py_UNUSED(closure))
{
    return Py_NewRef((PyObject *)self->ring);
}

/* ---- Event loops ------------------------------------------------------------------------- */

/* Sets a future, unless it is done: it may be cancelled. -1 with an exception. */
static int
set_future(PyObject *future)
{
    PyObject *done = PyObject_CallMethod(future, "done", NULL);
    PyObject *set = NULL;
    if (done == Py_False) {
        set = PyObject_CallMethod(future, "set_result", "O", Py_None);
    }
    const int failed = done == NULL || (done == Py_False && set == NULL);
    Py_XDECREF(done);
    Py_XDECREF(set);
    return failed ? -1 : 0;
}

static int
set_futures(PyObject *futures)
{
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(futures); i++) {
        PyObject *future = Py_NewRef(PyList_GET_ITEM(futures, i));
        const int failed = set_future(future);
        Py_DECREF(future);
        if (failed) {
            return -1;
        }
    }
    return 0;
}

/* The futures of the first request of the watch's that has finished, a new reference; or NULL. */
static PyObject *
first_finished_locked(const struct watch *watch)
{
    return watch->finished != NULL ? Py_NewRef(watch->finished->futures) : NULL;
}

/* Its futures were set: nobody needs to be told of it any more. */
static bool
drop_finished_locked(struct watch *watch, const PyObject *futures)
{
    struct request *request = watch->finished;
    if (request == NULL || request->futures != futures) {
        return false; /* whoever had it has let go of it meanwhile */
    }
    watch->finished = request->next;
    request->told = false;
    request->watch = NULL;
    return true;
}

static void
look_again(Ring *self, struct watch *watch)
{
    uint64_t value;
    ssize_t ignored = read(watch->event_fd, &value, sizeof(value));
    (void)ignored;
    ring_lock(self);
    Py_BEGIN_ALLOW_THREADS
    ring_fetch_locked(self);
    Py_END_ALLOW_THREADS
}

/* _arrived(watch): consumes what is there, and sets the futures of requests that have finished. The loop
 * is told again of futures that an exception left. */
PyObject *
ring_arrived(Ring *self, PyObject *object)
{
    if (!Py_IS_TYPE(object, self->module->watch_type)) {
        PyErr_SetString(PyExc_TypeError, "watch must be a Watch");
        return NULL;
    }
    if (ring_check_thread(self) < 0) {
        return NULL;
    }
    struct watch *watch = ((Watch *)object)->watch;
    CHAOS_POINT();
    look_again(self, watch);
    PyObject *futures;
    while ((futures = first_finished_locked(watch)) != NULL) {
        ring_unlock(self);
        CHAOS_POINT();
        const int failed = set_futures(futures);
        ring_lock(self);
        const bool dropped = !failed && drop_finished_locked(watch, futures);
        if (failed) {
            watch_tell(watch);
        }
        ring_unlock(self);
        if (dropped) {
            watch_release(watch); /* the request's own; this Watch has another */
        }
        Py_DECREF(futures);
        if (failed) {
            return NULL;
        }
        ring_lock(self);
    }
    ring_unlock(self);
    Py_RETURN_NONE;
}

/* ---- One short read ---------------------------------------------------------------------- */

#define SHORT_BYTES (1 << 20) /* as PIECE of gdsdirect/transfer.py: what is longer is split */

/* What a short read is held to, beside the bounds of each: it is of whole blocks, in their place. */
struct short_read {
    Py_ssize_t offset;
    Py_ssize_t nbytes;
    Py_ssize_t target;
    Py_ssize_t alignment;        /* of offset and nbytes */
    Py_ssize_t memory_alignment; /* of the address */
    bool fixed;
};

/* (source, offset, nbytes, target, alignment, memory_alignment, fixed). -1 with an exception. */
static int
short_read_get(PyObject *const *args, struct short_read *read)
{
    Py_ssize_t *const numbers[] = {&read->offset, &read->nbytes, &read->target, &read->alignment,
                                   &read->memory_alignment};
    for (size_t i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++) {
        *numbers[i] = PyNumber_AsSsize_t(args[i + 1], NULL); /* what is too large is out of range */
        if (*numbers[i] == -1 && PyErr_Occurred()) {
            return -1;
        }
    }
    read->fixed = args[6] == Py_True;
    return 0;
}

/* Whether a single read can bring it. */
static bool
is_short(const Ring *self, const struct short_read *read)
{
    const Py_ssize_t room = self->memory->nbytes;
    return read->nbytes >= 1 && read->nbytes <= SHORT_BYTES && read->offset >= 0 &&
           read->offset <= PY_SSIZE_T_MAX - read->nbytes && read->target >= 0 &&
           read->nbytes <= room && read->target <= room - read->nbytes && read->alignment >= 1 &&
           read->memory_alignment >= 1 && (read->offset | read->nbytes) % read->alignment == 0 &&
           ((uintptr_t)self->memory->address + (size_t)read->target) %
                   (size_t)read->memory_alignment ==
               0;
}

/* Whether the file has all of it now: with O_DIRECT the kernel fills the block that the file ends in, also
 * behind its end. A source that is closed is reported later. */
static bool
is_in_the_file(Source *source, const struct short_read *read)
{
    if (!source->is_direct || !gdsdirect_source_acquire(source)) {
        return true;
    }
    const off_t end = lseek(source->fd, 0, SEEK_END);
    gdsdirect_source_release(source);
    return end >= read->nbytes && read->offset <= end - read->nbytes;
}

/* A request of one such read. NULL without an exception: it isn't one. */
static struct request *
short_request(Ring *self, PyObject *source, const struct short_read *read)
{
    if (!is_short(self, read)) {
        return NULL;
    }
    struct request *request = request_new(1, 1, false);
    if (request == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    struct command *command = request->commands;
    command->position = (uint64_t)read->offset;
    command->address = (uintptr_t)self->memory->address + (uint64_t)read->target;
    command->nbytes = (uint32_t)read->nbytes;
    command->registered = read->fixed
                              ? check_registered(self, (uint64_t)read->target, command->nbytes)
                              : NOT_REGISTERED;
    if (take_sources(self, request, source) < 0 || borrow_memory(self, request) < 0 ||
        request->sources[0]->is_nvme || (read->fixed && command->registered == NOT_REGISTERED) ||
        !is_in_the_file(request->sources[0], read)) {
        request_free(request);
        return NULL;
    }
    request->way = way_of(request->sources[0], read->fixed);
    request->owned = true;
    return request;
}

/* Waits for what is in the way, and carries out a request that is this call's own. With the lock, which is
 * taken afterwards. */
static int
carry_out_one(Ring *self, struct request *request, int64_t deadline)
{
    int result = ring_clear_the_way(self, deadline);
    ring_lock(self);
    if (result == DONE) {
        result = request_start_locked(self, request);
    }
    if (result == DONE) {
        request_pump_locked(self);
        result = ring_finish_locked(self, request, deadline);
        if (result != DONE) {
            request_give_up_locked(self, request);
        }
    }
    return result;
}

/* The exception for a read that failed. Returns NULL. */
static PyObject *
raise_read(const Ring *self, int error, const Source *source)
{
    if (error == ETIME) {
        PyErr_SetNone(PyExc_TimeoutError);
    }
    else if (error == SOURCE_IS_CLOSED) {
        gdsdirect_source_raise_closed(source);
    }
    else {
        ring_raise(self, error, "io_uring_enter");
    }
    return NULL;
}

/* _read(source, offset, nbytes, target, alignment, memory_alignment, fixed, timeout) -> the bytes, if one read
 * brings them all; None: it is to be done the long way. `timeout` is in seconds, or None. */
PyObject *
ring_read(Ring *self, PyObject *const *args, Py_ssize_t nargs)
{
    int64_t deadline;
    struct short_read read;
    if (nargs != 8) {
        PyErr_SetString(PyExc_TypeError, "_read takes 8 arguments");
        return NULL;
    }
    if (short_read_get(args, &read) < 0 || ring_deadline(args[7], &deadline) < 0 ||
        ring_check_caller(self) < 0) {
        return NULL;
    }
    struct request *request = short_request(self, args[0], &read);
    if (request == NULL) {
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
    }
    const int result = carry_out_one(self, request, deadline);
    const bool whole = request->first_short == NO_COMMAND;
    const int error = result != DONE ? result : request->error;
    struct request *freed = disown_locked(self, request);
    ring_unlock(self);
    if (freed != NULL) {
        request_free(freed);
    }
    if (error != DONE) {
        return raise_read(self, error, (Source *)args[0]);
    }
    return whole ? PyLong_FromSsize_t(read.nbytes) : Py_NewRef(Py_None);
}

/* _begin(source, offset, nbytes, target, alignment, memory_alignment, fixed) -> as _read, without a wait: the
 * bytes, if they are there; a Request, if they are on their way; None: it is to be done the long way. */
PyObject *
ring_begin(Ring *self, PyObject *const *args, Py_ssize_t nargs)
{
    struct short_read read;
    if (nargs != 7) {
        PyErr_SetString(PyExc_TypeError, "_begin takes 7 arguments");
        return NULL;
    }
    if (short_read_get(args, &read) < 0 || ring_check_caller(self) < 0) {
        return NULL;
    }
    struct request *request = short_request(self, args[0], &read);
    if (request == NULL) {
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
    }
    Ring *busy = request_in_the_way(self);
    PyObject *object = request_object(self, request);
    if (busy != NULL || object == NULL) {
        Py_XDECREF(busy);
        Py_XDECREF(object);
        return busy != NULL ? Py_NewRef(Py_None) : NULL;
    }
    ring_lock(self);
    const int result = request_start_locked(self, request);
    if (result == DONE) {
        request_pump_locked(self);
        ring_reap_locked(self);
    }
    const int error = result != DONE ? result : request->error;
    const bool finished = result == DONE && request->left == 0;
    const bool whole = request->first_short == NO_COMMAND;
    ring_unlock(self);
    if (error == DONE && !finished) {
        return object;
    }
    Py_DECREF(object);
    if (error != DONE) {
        return raise_read(self, error, (Source *)args[0]);
    }
    return whole ? PyLong_FromSsize_t(read.nbytes) : Py_NewRef(Py_None);
}

/* ---- Type -------------------------------------------------------------------------------- */

static PyGetSetDef request_getset[] = {
    {"finished", (getter)request_get_finished, NULL, "Whether nothing of it is left.", NULL},
    {"ring", (getter)request_get_ring, NULL, "The ring that it is of.", NULL},
    {0},
};

static PyMethodDef request_methods[] = {
    {"give_up", (PyCFunction)request_give_up, METH_NOARGS,
     "give_up(): nobody waits for it any more; what the kernel has stays in flight."},
    {"attach", (PyCFunction)request_attach, METH_VARARGS,
     "attach(watch, future): Ring._arrived(watch) sets the future; False: it has finished."},
    {"take", (PyCFunction)request_take, METH_NOARGS,
     "take() -> [(index, res, nbytes)] of reads that were not whole."},
    {0},
};

static PyType_Slot request_slots[] = {
    {Py_tp_dealloc, request_dealloc},
    {Py_tp_traverse, request_traverse},
    {Py_tp_methods, request_methods},
    {Py_tp_getset, request_getset},
    {0, NULL},
};

PyType_Spec gdsdirect_request_spec = {
    .name = "gdsdirect._uring_cmd.Request",
    .basicsize = sizeof(Request),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE |
             Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = request_slots,
};
