/*
 * What callers submit: packed commands, reads of files.
 */
#include "submit.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include "check.h"

/* ---- submit_nvme_passthrough ------------------------------------------------------------- */

/* The Source that `object` is, or keeps as _source, a new reference; NULL without an exception: none. */
static Source *
source_of(Ring *self, PyObject *object)
{
    if (Py_IS_TYPE(object, self->module->source_type)) {
        return (Source *)Py_NewRef(object);
    }
    PyObject *source = PyObject_GetAttr(object, self->module->source_name);
    if (source == NULL) {
        if (PyErr_ExceptionMatches(PyExc_AttributeError)) {
            PyErr_Clear();
        }
        return NULL;
    }
    if (!Py_IS_TYPE(source, self->module->source_type)) {
        Py_CLEAR(source);
    }
    return (Source *)source;
}

static Source *
namespace_source(Ring *self, PyObject *object)
{
    Source *source = source_of(self, object);
    if ((source == NULL && !PyErr_Occurred()) || (source != NULL && !source->is_nvme)) {
        PyErr_Format(PyExc_TypeError, "namespace must be a gdsdirect.Namespace, not '%.100s'",
                     Py_TYPE(object)->tp_name);
        Py_CLEAR(source);
    }
    return source;
}

/* One keyword, user_data, after `positional` arguments. -1 with TypeError. */
static int
only_user_data(const char *call, Py_ssize_t positional, PyObject *const *args, Py_ssize_t nargs,
               PyObject *keywords, PyObject **user_data)
{
    Py_ssize_t named = keywords ? PyTuple_GET_SIZE(keywords) : 0;
    *user_data = NULL;
    if (nargs == positional && named == 0) {
        return 0;
    }
    if (nargs == positional && named == 1 &&
        PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(keywords, 0), "user_data") == 0) {
        *user_data = args[nargs];
        return 0;
    }
    PyErr_Format(PyExc_TypeError, "the arguments are %s", call);
    return -1;
}

static PyObject *
range_of(uint64_t first, size_t count)
{
    PyObject *range = NULL, *start = PyLong_FromUnsignedLongLong(first), *stop = NULL;
    if (start != NULL) {
        stop = count <= UINT64_MAX - first ? PyLong_FromUnsignedLongLong(first + count)
                                           : PyLong_FromString("18446744073709551616", NULL, 10);
    }
    if (stop != NULL) {
        PyObject *const args[] = {start, stop};
        range = PyObject_Vectorcall((PyObject *)&PyRange_Type, args, 2, NULL);
    }
    Py_XDECREF(start);
    Py_XDECREF(stop);
    return range;
}

/* A batch of the packed commands that `object` has, from `namespace`. -1 with an exception; either
 * way batch_clear ends it. */
static int
passthrough_batch(Ring *self, struct batch *batch, PyObject *namespace, PyObject *object)
{
    Py_buffer wire;
    batch->way = WAY_PASSTHROUGH;
    batch->lasting = true;
    batch->commands = batch->few;
    batch->source = namespace_source(self, namespace);
    if (batch->source == NULL || PyObject_GetBuffer(object, &wire, PyBUF_SIMPLE) < 0) {
        return -1;
    }
    int failed = check_commands(self, batch, &wire);
    PyBuffer_Release(&wire);
    return failed;
}

PyObject *
ring_submit_nvme_passthrough(Ring *self, PyObject *const *args, Py_ssize_t nargs,
                             PyObject *keywords)
{
    PyObject *user_data, *tokens = NULL;
    struct batch batch;
    if (only_user_data("submit_nvme_passthrough(namespace, commands, *, user_data=None)", 2, args,
                       nargs, keywords, &user_data) < 0 ||
        ring_check_caller(self) < 0) {
        return NULL;
    }
    batch.sent = 0;
    if (passthrough_batch(self, &batch, args[0], args[1]) == 0 &&
        send_batch(self, &batch, user_data) == 0) {
        tokens = range_of(batch.first_user_data, batch.count);
    }
    batch_clear(&batch);
    return tokens;
}

/* ---- submit_nvme_passthroughs ------------------------------------------------------------ */

/* Batch `index` of the caller's sequence. -1 with an exception that says which one it is. */
static int
passthrough_batch_of(Ring *self, struct batch *batch, PyObject *pair, Py_ssize_t index)
{
    batch->commands = batch->few;
    if (!PyTuple_Check(pair) || PyTuple_GET_SIZE(pair) != 2) {
        PyErr_Format(PyExc_TypeError, "batches[%zd] must be a tuple (namespace, commands)", index);
        return -1;
    }
    if (passthrough_batch(self, batch, PyTuple_GET_ITEM(pair, 0), PyTuple_GET_ITEM(pair, 1)) < 0) {
        PyObject *note = PyUnicode_FromFormat("in batches[%zd]; none was submitted", index);
        compat_add_note(note);
        Py_XDECREF(note);
        return -1;
    }
    return 0;
}

static PyObject *
list_of_ranges(const struct batch *batches, Py_ssize_t n)
{
    PyObject *list = PyList_New(n);
    for (Py_ssize_t i = 0; list != NULL && i < n; i++) {
        PyObject *range = range_of(batches[i].first_user_data, batches[i].count);
        if (range == NULL) {
            Py_CLEAR(list);
            break;
        }
        PyList_SET_ITEM(list, i, range);
    }
    return list;
}

PyObject *
ring_submit_nvme_passthroughs(Ring *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"batches", "user_data", NULL};
    PyObject *given, *user_data = NULL, *tokens = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|$O:submit_nvme_passthroughs", names, &given,
                                     &user_data) ||
        ring_check_caller(self) < 0) {
        return NULL;
    }
    PyObject *pairs = PySequence_Tuple(given); /* a copy: checking runs Python code */
    if (pairs == NULL) {
        return NULL;
    }
    const Py_ssize_t n = PyTuple_GET_SIZE(pairs);
    Py_ssize_t filled = 0;
    struct batch *batches = PyMem_Calloc((size_t)n, sizeof(*batches));
    if (batches == NULL) {
        Py_DECREF(pairs);
        return PyErr_NoMemory();
    }
    int failed = 0;
    while (filled < n && !failed) {
        failed =
            passthrough_batch_of(self, &batches[filled], PyTuple_GET_ITEM(pairs, filled), filled);
        filled++;
    }
    if (!failed && send_batches(self, batches, (size_t)n, user_data) == 0) {
        tokens = list_of_ranges(batches, n);
    }
    while (filled > 0) {
        batch_clear(&batches[--filled]);
    }
    PyMem_Free(batches);
    Py_DECREF(pairs);
    return tokens;
}

/* ---- submit_read, submit_read_fixed ------------------------------------------------------ */

/* What messages call a file: its name, if it has one. */
static PyObject *
name_of(const Ring *self, PyObject *file, int fd)
{
    PyObject *name = PyObject_GetAttr(file, self->module->name_name);
    if (name != NULL && PyUnicode_Check(name)) {
        return name;
    }
    PyErr_Clear();
    Py_XDECREF(name);
    return PyUnicode_FromFormat("file descriptor %d", fd);
}

/* A Source on a duplicate of the caller's descriptor, which may be closed, and its number reused, before the
 * kernel looks it up. */
static Source *
duplicate_of(Ring *self, PyObject *file)
{
    const int fd = PyObject_AsFileDescriptor(file);
    if (fd < 0) {
        return NULL;
    }
    const int own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    const int flags = own < 0 ? -1 : fcntl(own, F_GETFL);
    const int failed = errno;
    PyObject *name = name_of(self, file, fd);
    Source *source = NULL;
    if (name != NULL && flags >= 0) {
        source = gdsdirect_source_own_fd(self->module->source_type, own, flags, name);
    }
    else if (name != NULL) {
        ring_raise_errno(failed, "duplicating the descriptor", name);
    }
    if (source == NULL && own >= 0) {
        close(own);
    }
    Py_XDECREF(name);
    return source;
}

/* The Source that `file` keeps (`lasting`), or one of this submission alone. */
static Source *
file_source(Ring *self, PyObject *file, bool *lasting)
{
    Source *source = source_of(self, file);
    *lasting = source != NULL;
    if (source != NULL && source->is_nvme) {
        PyErr_Format(PyExc_TypeError,
                     "%S is an NVMe namespace: read it with submit_nvme_passthrough", source->path);
        Py_CLEAR(source);
    }
    return source != NULL || PyErr_Occurred() ? source : duplicate_of(self, file);
}

/* Why a read can't go into registered memory: stream.py has the words. Returns -1. */
static int
refuse_fixed(Ring *self)
{
    if (self->registered > 0) {
        PyErr_SetString(PyExc_ValueError,
                        "the target crosses a multiple of 1 GiB in the buffer, and the kernel "
                        "registers no more in one piece: split the read there");
        return -1;
    }
    PyObject *error =
        PyObject_CallMethod((PyObject *)self, "_registration_error", "i", self->register_errno);
    if (error != NULL) {
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
        Py_DECREF(error);
    }
    return -1;
}

/* Settles whether the batch's commands go into registered memory. -1 with an exception. */
static int
settle_registered(Ring *self, struct batch *batch, bool fixed)
{
    for (size_t i = 0; i < batch->count; i++) {
        if (!fixed) {
            batch->commands[i].registered = NOT_REGISTERED;
        }
        else if (batch->commands[i].registered == NOT_REGISTERED) {
            return refuse_fixed(self);
        }
    }
    return 0;
}

/* Sends a batch of checked reads of `file`. -1 with an exception. */
static int
send_file_reads(Ring *self, struct batch *batch, PyObject *file, bool fixed, PyObject *user_data)
{
    if (settle_registered(self, batch, fixed) < 0) {
        return -1;
    }
    batch->source = file_source(self, file, &batch->lasting);
    if (batch->source == NULL) {
        return -1;
    }
    batch->way = way_of(batch->source, fixed);
    return send_batch(self, batch, user_data);
}

static PyObject *
submit_file_read(Ring *self, PyObject *args, PyObject *kwargs, bool fixed)
{
    static char *names[] = {"file", "file_offset", "nbytes", "target_offset", "user_data", NULL};
    PyObject *file, *file_offset, *nbytes, *target_offset, *user_data = NULL, *token = NULL;
    struct batch batch = {.commands = batch.few, .count = 1};

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO|$O", names, &file, &file_offset, &nbytes,
                                     &target_offset, &user_data) ||
        check_file_read(self, batch.few, file_offset, nbytes, target_offset) < 0 ||
        ring_check_caller(self) < 0) {
        return NULL;
    }
    if (send_file_reads(self, &batch, file, fixed, user_data) == 0) {
        token = PyLong_FromUnsignedLongLong(batch.first_user_data);
    }
    batch_clear(&batch);
    return token;
}

PyObject *
ring_submit_read(Ring *self, PyObject *args, PyObject *kwargs)
{
    return submit_file_read(self, args, kwargs, false);
}

PyObject *
ring_submit_read_fixed(Ring *self, PyObject *args, PyObject *kwargs)
{
    return submit_file_read(self, args, kwargs, true);
}

/* ---- submit_reads, submit_reads_fixed ---------------------------------------------------- */

static PyObject *
submit_file_reads(Ring *self, PyObject *args, PyObject *kwargs, bool fixed)
{
    static char *names[] = {"file", "file_offsets", "nbytes", "target_offsets", "user_data", NULL};
    PyObject *file, *file_offsets, *nbytes, *target_offsets, *user_data = NULL, *tokens = NULL;
    struct read_arrays arrays = {0};
    struct batch batch;
    batch.sent = 0;
    batch.source = NULL;
    batch.commands = batch.few;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO|$O", names, &file, &file_offsets, &nbytes,
                                     &target_offsets, &user_data) ||
        ring_check_caller(self) < 0) {
        return NULL;
    }
    if (read_arrays_get(self, &arrays, file_offsets, nbytes, target_offsets) == 0 &&
        check_array_reads(self, &arrays, &batch) == 0 &&
        send_file_reads(self, &batch, file, fixed, user_data) == 0) {
        tokens = range_of(batch.first_user_data, batch.count);
    }
    batch_clear(&batch);
    read_arrays_release(&arrays);
    return tokens;
}

PyObject *
ring_submit_reads(Ring *self, PyObject *args, PyObject *kwargs)
{
    return submit_file_reads(self, args, kwargs, false);
}

PyObject *
ring_submit_reads_fixed(Ring *self, PyObject *args, PyObject *kwargs)
{
    return submit_file_reads(self, args, kwargs, true);
}
