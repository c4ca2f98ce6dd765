/*
 * Many files: opened in one batch, and read from the page cache.
 *
 * open_sources sends IORING_OP_OPENAT on a ring that lives as long as the call.
 *
 * Where directories and inodes are in the caches this saves the system calls; where they are not, the
 * kernel's workers look several up at a time. Plain descriptors, and not entries of the ring's file
 * table, since only those can be asked what they are.
 */
#include "module.h"

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

/* (path, Source, size); (path, None, 0) for what is not open. */
static PyObject *
opened_source(PyTypeObject *type, struct opening *each, PyObject *path, int flags)
{
    if (each->fd < 0) {
        return Py_BuildValue("(OOi)", path, Py_None, 0);
    }
    Source *source = gdsdirect_source_own_fd(type, each->fd, flags, path);
    if (source == NULL) {
        return NULL;
    }
    each->fd = -1;
    return Py_BuildValue("(ONL)", path, (PyObject *)source, (long long)each->size);
}

static PyObject *
list_of_sources(PyTypeObject *type, struct opening *openings, PyObject *paths, int flags)
{
    const Py_ssize_t n = PyTuple_GET_SIZE(paths);
    PyObject *list = PyList_New(n);
    for (Py_ssize_t i = 0; list != NULL && i < n; i++) {
        PyObject *item = opened_source(type, &openings[i], PyTuple_GET_ITEM(paths, i), flags);
        if (item == NULL) {
            Py_CLEAR(list);
            break;
        }
        PyList_SET_ITEM(list, i, item);
    }
    return list;
}

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

/* open_sources(paths, flags) -> for each path (path, Source, size); (path, None, 0) where it can't be opened,
 * or is no regular file. `flags` are those of open(2). */
PyObject *
gdsdirect_open_sources(PyObject *module, PyObject *args)
{
    struct module_state *state = PyModule_GetState(module);
    PyObject *given, *list = NULL, *encoded = NULL;
    int flags, failed;
    if (!PyArg_ParseTuple(args, "Oi:open_sources", &given, &flags)) {
        return NULL;
    }
    PyObject *paths = PySequence_Tuple(given);
    if (paths == NULL) {
        return NULL;
    }
    const size_t n = (size_t)PyTuple_GET_SIZE(paths);
    struct opening *openings = PyMem_Calloc(n, sizeof(*openings));
    if (openings == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    encoded = encode_paths(paths, openings);
    if (encoded == NULL) {
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    failed = open_all(openings, n, flags);
    for (size_t i = 0; i < n && !failed; i++) {
        examine(&openings[i], flags);
    }
    Py_END_ALLOW_THREADS
    if (failed) {
        errno = failed;
        PyErr_SetFromErrno(PyExc_OSError);
        goto done;
    }
    list = list_of_sources(state->source_type, openings, paths, flags);
    for (size_t i = 0; i < n && list == NULL; i++) {
        if (openings[i].fd >= 0) {
            close(openings[i].fd);
        }
    }
done:
    Py_XDECREF(encoded);
    PyMem_Free(openings);
    Py_DECREF(paths);
    return list;
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

/* read_sources(memory, sources, sizes, targets) -> for each the bytes read from its start, or -errno. For
 * files in the page cache, from which the calling thread copies: no ring makes that faster, and without the
 * GIL several threads do it at a time. The tuple keeps the sources, whose descriptors nobody else closes. */
PyObject *
gdsdirect_read_sources(PyObject *module, PyObject *args)
{
    struct module_state *state = PyModule_GetState(module);
    PyObject *given, *sources, *sizes, *targets, *list = NULL;
    Py_buffer memory;
    if (!PyArg_ParseTuple(args, "OO!O!O!:read_sources", &given, &PyTuple_Type, &sources,
                          &PyTuple_Type, &sizes, &PyTuple_Type, &targets)) {
        return NULL;
    }
    const Py_ssize_t n = PyTuple_GET_SIZE(sources);
    if (PyTuple_GET_SIZE(sizes) != n || PyTuple_GET_SIZE(targets) != n) {
        return PyErr_Format(PyExc_ValueError, "give as many sources, sizes and targets");
    }
    if (PyObject_GetBuffer(given, &memory, PyBUF_WRITABLE) < 0) {
        return NULL;
    }
    struct whole *wholes = PyMem_Calloc((size_t)n, sizeof(*wholes));
    if (wholes == NULL) {
        PyErr_NoMemory();
    }
    else if (fill_wholes(state->source_type, wholes, sources, sizes, targets, &memory) == 0) {
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t i = 0; i < n; i++) {
            read_whole(&wholes[i]);
        }
        Py_END_ALLOW_THREADS
        list = PyList_New(n);
    }
    for (Py_ssize_t i = 0; list != NULL && i < n; i++) {
        PyObject *result = PyLong_FromLongLong(wholes[i].result);
        if (result == NULL) {
            Py_CLEAR(list);
            break;
        }
        PyList_SET_ITEM(list, i, result);
    }
    PyMem_Free(wholes);
    PyBuffer_Release(&memory);
    return list;
}
