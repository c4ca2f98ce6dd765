/*
 * Many files: opened in one batch, and read from the page cache.
 *
 * open_sources sends IORING_OP_OPENAT on a ring that lives as long as the call.
 *
 * Where directories and inodes are in the caches this saves the system calls; where they are not, the
 * kernel's workers look several up at a time. Plain descriptors, and not entries of the ring's file
 * table, since only those can be asked what they are.
 */
#include "jobs.h"

#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <sys/stat.h>
#include <unistd.h>

#define OPENS 64 /* in flight together */

struct opening {
    const char *path; /* in the bytes object of its place in `encoded` */
    int fd;           /* or negative */
    int64_t size;
};

/* A FIFO would wait for its writer: with O_NONBLOCK it does not. */
static void
prepare_open(struct io_uring *ring, struct opening *each, int flags)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(ring);
    io_uring_prep_openat(sqe, AT_FDCWD, each->path, flags | O_NONBLOCK, 0);
    io_uring_sqe_set_data(sqe, each);
}

/* Opens all, `OPENS` at a time. 0 or a positive errno of the ring's own, and then none is open. */
static int
open_all(struct opening *openings, size_t n, int flags)
{
    struct io_uring ring;
    int result = io_uring_queue_init(OPENS, &ring, 0);
    if (result < 0) {
        return -result;
    }
    for (size_t sent = 0, done = 0; done < n;) {
        while (sent < n && sent - done < OPENS) {
            prepare_open(&ring, &openings[sent++], flags);
        }
        /* Submitted already or not: what is left of the queue goes with the next call. */
        do {
            result = io_uring_submit_and_wait(&ring, 1);
        } while (result == -EINTR || result == -EAGAIN || result == -EBUSY);
        struct io_uring_cqe *cqe;
        unsigned head, seen = 0;
        io_uring_for_each_cqe(&ring, head, cqe) {
            ((struct opening *)io_uring_cqe_get_data(cqe))->fd = cqe->res;
            seen++;
        }
        io_uring_cq_advance(&ring, seen);
        done += seen;
    }
    io_uring_queue_exit(&ring);
    return 0;
}

/* Regular files only, which are what a batch is for: others are closed. */
static void
examine(struct opening *each, int flags)
{
    struct stat info;
    if (each->fd < 0) {
        return;
    }
    if (fstat(each->fd, &info) < 0 || !S_ISREG(info.st_mode) ||
        fcntl(each->fd, F_SETFL, flags) < 0) {
        close(each->fd);
        each->fd = -1;
        return;
    }
    each->size = info.st_size;
}

/* The opening of many files. */
struct opens {
    PyObject *module;
    PyObject *paths;   /* a tuple of str */
    PyObject *encoded; /* of bytes, as the file system has them */
    struct opening *openings;
    size_t count;
    int flags;
    int failed; /* errno of the ring's own */
};

static void
opens_run(void *data)
{
    struct opens *self = data;
    self->failed = open_all(self->openings, self->count, self->flags);
    for (size_t i = 0; i < self->count && !self->failed; i++) {
        examine(&self->openings[i], self->flags);
    }
}

/* (path, Source, size); (path, None, 0) for what is not open. */
static PyObject *
opened_source(PyTypeObject *type, const struct opening *each, PyObject *path, int flags)
{
    if (each->fd < 0) {
        return Py_BuildValue("(OOi)", path, Py_None, 0);
    }
    PyObject *source = (PyObject *)gdsdirect_source_own_fd(type, each->fd, flags, path);
    return source ? Py_BuildValue("(ONL)", path, source, (long long)each->size) : NULL;
}

/* The sources have the descriptors from then on: it can be asked for once. */
static PyObject *
opens_result(void *data)
{
    struct opens *self = data;
    struct module_state *state = PyModule_GetState(self->module);
    if (self->failed) {
        errno = self->failed;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    PyObject *list = PyList_New((Py_ssize_t)self->count);
    for (size_t i = 0; list != NULL && i < self->count; i++) {
        PyObject *item = opened_source(state->source_type, &self->openings[i],
                                       PyTuple_GET_ITEM(self->paths, (Py_ssize_t)i), self->flags);
        if (item == NULL) {
            Py_CLEAR(list);
            break;
        }
        self->openings[i].fd = -1;
        PyList_SET_ITEM(list, (Py_ssize_t)i, item);
    }
    return list;
}

static void
opens_clear(void *data)
{
    struct opens *self = data;
    for (size_t i = 0; self->openings != NULL && i < self->count; i++) {
        if (self->openings[i].fd >= 0) {
            close(self->openings[i].fd);
        }
    }
    PyMem_Free(self->openings);
    Py_XDECREF(self->encoded);
    Py_XDECREF(self->paths);
    Py_XDECREF(self->module);
    PyMem_Free(self);
}

static const struct job_kind opens_kind = {opens_run, opens_result, opens_clear};

/* The paths as the file system has them, whose bytes live as long as the tuple that is returned. */
static PyObject *
encode_paths(PyObject *paths, struct opening *openings)
{
    const Py_ssize_t n = PyTuple_GET_SIZE(paths);
    PyObject *encoded = PyTuple_New(n);
    for (Py_ssize_t i = 0; encoded != NULL && i < n; i++) {
        PyObject *path;
        if (!PyUnicode_FSConverter(PyTuple_GET_ITEM(paths, i), &path)) {
            Py_CLEAR(encoded);
            break;
        }
        PyTuple_SET_ITEM(encoded, i, path);
        openings[i] = (struct opening){.path = PyBytes_AS_STRING(path), .fd = -1};
    }
    return encoded;
}

/* open_sources(paths, flags) -> a Job, whose result has for each path (path, Source, size); (path, None, 0)
 * where it can't be opened, or is no regular file. `flags` are those of open(2). */
PyObject *
gdsdirect_open_sources(PyObject *module, PyObject *args)
{
    PyObject *given;
    int flags;
    if (!PyArg_ParseTuple(args, "Oi:open_sources", &given, &flags)) {
        return NULL;
    }
    struct opens *self = PyMem_Calloc(1, sizeof(*self));
    if (self == NULL) {
        return PyErr_NoMemory();
    }
    self->module = Py_NewRef(module);
    self->flags = flags;
    self->paths = PySequence_Tuple(given);
    const size_t n = self->paths != NULL ? (size_t)PyTuple_GET_SIZE(self->paths) : 0;
    self->openings = PyMem_Calloc(n + 1, sizeof(*self->openings));
    if (self->paths == NULL || self->openings == NULL ||
        (self->encoded = encode_paths(self->paths, self->openings)) == NULL) {
        if (!PyErr_Occurred()) {
            PyErr_NoMemory();
        }
        opens_clear(self);
        return NULL;
    }
    self->count = n; /* from here on all have their descriptor, or -1 */
    return gdsdirect_job(module, &opens_kind, self);
}

/* ---- read_sources ------------------------------------------------------------------------- */

/* A read of a whole file: what the kernel is asked for, and what came of it. */
struct whole {
    int fd;
    char *target;
    size_t size;
    int64_t result; /* bytes, or -errno */
};

static void
read_whole(struct whole *each)
{
    size_t done = 0;
    while (done < each->size) {
        const ssize_t came = pread(each->fd, each->target + done, each->size - done, (off_t)done);
        if (came < 0 && errno == EINTR) {
            continue;
        }
        if (came <= 0) {
            each->result = came < 0 ? -errno : (int64_t)done;
            return;
        }
        done += (size_t)came;
    }
    each->result = (int64_t)done;
}

/* What the arrays say, checked against the memory. -1 with an exception. */
static int
fill_wholes(PyTypeObject *type, struct whole *wholes, PyObject *sources, PyObject *sizes,
            PyObject *targets, const Py_buffer *memory)
{
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(sources); i++) {
        PyObject *source = PyTuple_GET_ITEM(sources, i);
        const Py_ssize_t size = PyLong_AsSsize_t(PyTuple_GET_ITEM(sizes, i));
        const Py_ssize_t target = PyLong_AsSsize_t(PyTuple_GET_ITEM(targets, i));
        if (PyErr_Occurred()) {
            return -1;
        }
        if (!Py_IS_TYPE(source, type) || size < 0 || target < 0 || size > memory->len ||
            target > memory->len - size) {
            PyErr_Format(PyExc_ValueError, "read %zd: %zd bytes at %zd of %zd", i, size, target,
                         memory->len);
            return -1;
        }
        wholes[i] = (struct whole){
            .fd = ((Source *)source)->fd,
            .target = (char *)memory->buf + target,
            .size = (size_t)size,
        };
    }
    return 0;
}

/* The copying of many files. */
struct copies {
    PyObject *sources; /* a tuple, which keeps their descriptors */
    Py_buffer memory;
    struct whole *wholes;
    size_t count;
    size_t held; /* of the sources, the first so many are held open */
};

static void
copies_run(void *data)
{
    struct copies *self = data;
    for (size_t i = 0; i < self->count; i++) {
        read_whole(&self->wholes[i]);
    }
}

static PyObject *
copies_result(void *data)
{
    const struct copies *self = data;
    PyObject *list = PyList_New((Py_ssize_t)self->count);
    for (size_t i = 0; list != NULL && i < self->count; i++) {
        PyObject *result = PyLong_FromLongLong(self->wholes[i].result);
        if (result == NULL) {
            Py_CLEAR(list);
            break;
        }
        PyList_SET_ITEM(list, (Py_ssize_t)i, result);
    }
    return list;
}

static void
copies_clear(void *data)
{
    struct copies *self = data;
    for (size_t i = 0; i < self->held; i++) {
        gdsdirect_source_release((Source *)PyTuple_GET_ITEM(self->sources, (Py_ssize_t)i));
    }
    PyMem_Free(self->wholes);
    Py_XDECREF(self->sources);
    PyBuffer_Release(&self->memory);
    PyMem_Free(self);
}

static const struct job_kind copies_kind = {copies_run, copies_result, copies_clear};

/* Keeps their descriptors open. -1 with ValueError for one that is closed. */
static int
hold_all(struct copies *self)
{
    while (self->held < self->count) {
        Source *source = (Source *)PyTuple_GET_ITEM(self->sources, (Py_ssize_t)self->held);
        if (!gdsdirect_source_acquire(source)) {
            gdsdirect_source_raise_closed(source);
            return -1;
        }
        self->held++;
    }
    return 0;
}

/* read_sources(memory, sources, sizes, targets) -> a Job, whose result has for each the bytes read from its
 * start, or -errno. For files in the page cache, from which a thread copies: no ring makes that faster, and
 * several threads do it at a time. */
PyObject *
gdsdirect_read_sources(PyObject *module, PyObject *args)
{
    struct module_state *state = PyModule_GetState(module);
    PyObject *given, *sources, *sizes, *targets;
    if (!PyArg_ParseTuple(args, "OO!O!O!:read_sources", &given, &PyTuple_Type, &sources,
                          &PyTuple_Type, &sizes, &PyTuple_Type, &targets)) {
        return NULL;
    }
    const Py_ssize_t n = PyTuple_GET_SIZE(sources);
    if (PyTuple_GET_SIZE(sizes) != n || PyTuple_GET_SIZE(targets) != n) {
        return PyErr_Format(PyExc_ValueError, "give as many sources, sizes and targets");
    }
    struct copies *self = PyMem_Calloc(1, sizeof(*self));
    if (self == NULL) {
        return PyErr_NoMemory();
    }
    self->sources = Py_NewRef(sources);
    self->wholes = PyMem_Calloc((size_t)n + 1, sizeof(*self->wholes));
    if (self->wholes == NULL) {
        PyErr_NoMemory();
    }
    else if (PyObject_GetBuffer(given, &self->memory, PyBUF_WRITABLE) == 0 &&
             fill_wholes(state->source_type, self->wholes, sources, sizes, targets,
                         &self->memory) == 0) {
        self->count = (size_t)n;
        if (hold_all(self) == 0) {
            return gdsdirect_job(module, &copies_kind, self);
        }
    }
    copies_clear(self);
    return NULL;
}
