/*
 * Source: an open file that commands read from. Its descriptor outlives every command in flight.
 */
#include "module.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "dioalign.h"

/* ---- The descriptor ---------------------------------------------------------------------- */

bool
gdsdirect_source_acquire(Source *source)
{
    uint32_t users = atomic_load(&source->users);
    do {
        if (users & SOURCE_CLOSED) {
            return false;
        }
        CHAOS_POINT();
    } while (!atomic_compare_exchange_weak(&source->users, &users, users + 1));
    CHAOS_POINT();
    return true;
}

/* The last user of a closed source closes the descriptor: here, or in close(). */
void
gdsdirect_source_release(Source *source)
{
    CHAOS_POINT();
    if (atomic_fetch_sub(&source->users, 1) == (SOURCE_CLOSED | 1)) {
        CHAOS_POINT();
        close(source->fd);
    }
}

PyObject *
gdsdirect_source_raise_closed(const Source *source)
{
    return PyErr_Format(PyExc_ValueError, "%S is closed", source->path);
}

static void
source_shut(Source *self)
{
    if (self->fd < 0) {
        return;
    }
    if (atomic_fetch_or(&self->users, SOURCE_CLOSED) == 0) {
        CHAOS_POINT();
        close(self->fd);
    }
    CHAOS_POINT();
    struct module_state *module = PyModule_GetState(self->module);
    atomic_fetch_add(&module->closings, 1);
}

/* Without a descriptor, which is still whose it was. NULL with an exception. */
static Source *
source_alloc(PyTypeObject *type, PyObject *path)
{
    Source *self = (Source *)type->tp_alloc(type, 0);
    if (self != NULL) {
        self->fd = -1;
        self->path = Py_NewRef(path);
        self->module = Py_NewRef(PyType_GetModule(type));
    }
    return self;
}

static PyObject *
source_close(Source *self, PyObject *Py_UNUSED(ignored))
{
    source_shut(self);
    Py_RETURN_NONE;
}

static PyObject *
source_fileno(Source *self, PyObject *Py_UNUSED(ignored))
{
    if (source_is_closed(self)) {
        return gdsdirect_source_raise_closed(self);
    }
    CHAOS_POINT();
    return PyLong_FromLong(self->fd);
}

/* Keeps the descriptor open until source_release. -1 with ValueError once it is closed. */
static int
source_hold(Source *self)
{
    if (gdsdirect_source_acquire(self)) {
        return 0;
    }
    gdsdirect_source_raise_closed(self);
    return -1;
}

/* using(function, *args): function(fd, *args), while nobody closes the descriptor, whose number would then
 * be another file's. */
static PyObject *
source_using(Source *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs < 1) {
        PyErr_SetString(PyExc_TypeError, "using(function, *args) takes a function first");
        return NULL;
    }
    PyObject **stack = PyMem_New(PyObject *, (size_t)nargs);
    if (stack == NULL) {
        return PyErr_NoMemory();
    }
    PyObject *result = NULL;
    stack[0] = source_hold(self) == 0 ? PyLong_FromLong(self->fd) : NULL;
    if (stack[0] != NULL) {
        for (Py_ssize_t i = 1; i < nargs; i++) {
            stack[i] = args[i];
        }
        result = PyObject_Vectorcall(args[0], stack, (size_t)nargs, NULL);
        gdsdirect_source_release(self);
        Py_DECREF(stack[0]);
    }
    PyMem_Free(stack);
    return result;
}

/* The end of the file or device: bytes that there are now. */
static PyObject *
source_size(Source *self, PyObject *Py_UNUSED(ignored))
{
    if (source_hold(self) < 0) {
        return NULL;
    }
    const off_t end = lseek(self->fd, 0, SEEK_END);
    const int failed = errno;
    gdsdirect_source_release(self);
    if (end < 0) {
        errno = failed;
        return PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, self->path);
    }
    return PyLong_FromLongLong(end);
}

/* ---- Lifetime ---------------------------------------------------------------------------- */

/* Whether the file system keeps its files in memory, and nowhere else. */
static bool
is_in_memory(int fd)
{
    struct statfs system;
    return fstatfs(fd, &system) == 0 &&
           (system.f_type == TMPFS_MAGIC || system.f_type == RAMFS_MAGIC ||
            system.f_type == HUGETLBFS_MAGIC);
}

/* Whether reads go past the page cache. File systems whose files are in memory have nothing else:
 * tmpfs takes O_DIRECT all the same from Linux 6.6 on, and copies. Device nodes are on such a file
 * system too, but their bytes aren't. Others take it and copy what they can't read directly, such as
 * ext4's encrypted files, and say so since Linux 6.1: with STATX_DIOALIGN (0, 0). */
static bool
reads_directly(int fd, int flags)
{
    struct statx file;
    if (!(flags & O_DIRECT)) {
        return false;
    }
    if (statx(fd, "", AT_EMPTY_PATH, STATX_TYPE | STATX_DIOALIGN, &file) < 0 ||
        !S_ISREG(file.stx_mode)) {
        return true;
    }
    if (file.stx_mask & STATX_DIOALIGN && dioalign_of(&file).offset == 0) {
        return false;
    }
    return !is_in_memory(fd);
}

/* Whether a read can wait for others, such as a FUSE file's server, inside the system call that submits it.
 * io_uring asks a file for what is there at once only if it says that it can tell (FMODE_NOWAIT), and else,
 * where there is no block device below, calls it as it is (io_file_supports_nowait; Linux 6.18). Such a file
 * refuses RWF_NOWAIT. What is in memory waits for nobody. */
static bool
waits_for_others(int fd)
{
    char byte;
    const struct iovec piece = {.iov_base = &byte, .iov_len = 1};
    struct stat file;
    return preadv2(fd, &piece, 1, 0, RWF_NOWAIT) < 0 && errno == EOPNOTSUPP &&
           fstat(fd, &file) == 0 && S_ISREG(file.st_mode) && !is_in_memory(fd);
}

/* Finds out how the file is to be read. */
static void
learn(Source *self, int flags)
{
    self->is_direct = reads_directly(self->fd, flags);
    self->may_block = (flags & O_ACCMODE) != O_WRONLY && waits_for_others(self->fd);
}

static int
source_set_bounds(Source *self, unsigned int lba_size, unsigned long long max_transfer)
{
    if (lba_size < 512 || lba_size & (lba_size - 1)) {
        PyErr_Format(PyExc_ValueError, "%S: lba_size is %u, not a power of two from 512 up",
                     self->path, lba_size);
        return -1;
    }
    self->lba_shift = (uint32_t)__builtin_ctz(lba_size);
    self->max_transfer = max_transfer < UINT32_MAX ? (uint32_t)max_transfer : UINT32_MAX;
    self->is_nvme = true;
    return 0;
}

static PyObject *
source_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"fd", "path", NULL};
    int fd;
    PyObject *path;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iU:Source", names, &fd, &path)) {
        return NULL;
    }
    const int flags = fcntl(fd, F_GETFL);
    if (flags < 0) {
        return PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, path);
    }
    return (PyObject *)gdsdirect_source_own_fd(type, fd, flags, path);
}

/* bind(...): it is an NVMe namespace, and these are the bounds of its commands. Once, before anybody reads. */
static PyObject *
source_bind(Source *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"nsid",          "lba_size",      "capacity", "max_transfer",
                            "safe_transfer", "metadata_size", NULL};
    unsigned int nsid, lba_size, metadata_size;
    unsigned long long capacity, max_transfer, safe_transfer;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$IIKKKI:bind", names, &nsid, &lba_size,
                                     &capacity, &max_transfer, &safe_transfer, &metadata_size)) {
        return NULL;
    }
    self->nsid = nsid;
    self->capacity = capacity;
    self->metadata_size = metadata_size;
    self->safe_transfer = safe_transfer < UINT32_MAX ? (uint32_t)safe_transfer : UINT32_MAX;
    if (source_set_bounds(self, lba_size, max_transfer) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

Source *
gdsdirect_source_own_fd(PyTypeObject *type, int fd, int flags, PyObject *path)
{
    Source *self = source_alloc(type, path);
    if (self != NULL) {
        self->fd = fd;
        learn(self, flags);
    }
    return self;
}

/* open_source(name, flags, path) -> Source: open(2) of `name`, which messages call `path`. */
PyObject *
gdsdirect_open_source(PyObject *module, PyObject *args)
{
    struct module_state *state = PyModule_GetState(module);
    PyObject *name, *path;
    int flags, fd;
    if (!PyArg_ParseTuple(args, "O&iU:open_source", PyUnicode_FSConverter, &name, &flags, &path)) {
        return NULL;
    }
    do {
        Py_BEGIN_ALLOW_THREADS
        fd = open(PyBytes_AS_STRING(name), flags | O_CLOEXEC);
        Py_END_ALLOW_THREADS
    } while (fd < 0 && errno == EINTR && PyErr_CheckSignals() == 0);
    Source *self = NULL;
    if (fd >= 0) {
        self = gdsdirect_source_own_fd(state->source_type, fd, flags, path);
    }
    else if (!PyErr_Occurred()) {
        PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, path);
    }
    if (self == NULL && fd >= 0) {
        close(fd);
    }
    Py_DECREF(name);
    return (PyObject *)self;
}

static int
source_traverse(Source *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->module);
    return 0; /* path is a str and can't be part of a cycle */
}

static void
source_dealloc(Source *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    source_shut(self);
    Py_XDECREF(self->path);
    Py_XDECREF(self->module);
    type->tp_free(self);
    Py_DECREF(type);
}

/* ---- Attributes -------------------------------------------------------------------------- */

static PyObject *
source_get_closed(Source *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(source_is_closed(self));
}

static PyObject *
source_get_direct(Source *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(self->is_direct);
}

static PyObject *
source_get_path(Source *self, void *Py_UNUSED(closure))
{
    return Py_NewRef(self->path);
}

static PyObject *
source_get_nsid(Source *self, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLong(self->nsid);
}

static PyObject *
source_get_lba_size(Source *self, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLong(self->is_nvme ? 1ul << self->lba_shift : 0);
}

static PyGetSetDef source_getset[] = {
    {"closed", (getter)source_get_closed, NULL, "Whether close() was called.", NULL},
    {"direct", (getter)source_get_direct, NULL, "Whether reads go past the page cache.", NULL},
    {"path", (getter)source_get_path, NULL, "What messages call it.", NULL},
    {"nsid", (getter)source_get_nsid, NULL, "Namespace id; 0: not an NVMe namespace.", NULL},
    {"lba_size", (getter)source_get_lba_size, NULL, "Bytes of a block, or 0.", NULL},
    {0},
};

static PyMethodDef source_methods[] = {
    {"close", (PyCFunction)source_close, METH_NOARGS,
     "Close the descriptor, as soon as no command in flight needs it."},
    {"fileno", (PyCFunction)source_fileno, METH_NOARGS, "The descriptor; ValueError once closed."},
    {"size", (PyCFunction)source_size, METH_NOARGS,
     "Bytes that there are; ValueError once closed."},
    {"bind", KEYWORDS(source_bind), METH_VARARGS | METH_KEYWORDS,
     "bind(*, nsid, lba_size, …): it is an NVMe namespace, with these bounds of its commands."},
    {"using", FASTCALL(source_using), METH_FASTCALL,
     "using(function, *args): function(fd, *args), with the descriptor held open."},
    {0},
};

static PyType_Slot source_slots[] = {
    {Py_tp_new, source_new},
    {Py_tp_dealloc, source_dealloc},
    {Py_tp_traverse, source_traverse},
    {Py_tp_methods, source_methods},
    {Py_tp_getset, source_getset},
    {Py_tp_doc, "Source(fd, path)\n\n"
                "An open file that commands read from. Owns fd from then on."},
    {0, NULL},
};

PyType_Spec gdsdirect_source_spec = {
    .name = "gdsdirect._uring_cmd.Source",
    .basicsize = sizeof(Source),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = source_slots,
};
