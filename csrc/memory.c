/*
 * Memory: the range of addresses below a GpuMappedBuffer, and the count of those who use it.
 */
#include "module.h"

#define CLOSED (-1)

/* ---- Lifetime ---------------------------------------------------------------------------- */

/* A buffer of what a memoryview is of, instead of the memoryview's own, which is `self->exporter` so
 * far: before 3.11.9 and 3.12.3 CPython crashes when it collects a memoryview in a cycle while a buffer
 * of it is out (gh-77894). */
static void
memory_hold_base(Memory *self, PyObject *view)
{
    Py_buffer whole;
    PyObject *base = PyMemoryView_GET_BASE(view);
    if (base == NULL || PyObject_GetBuffer(base, &whole, PyBUF_WRITABLE) < 0) {
        PyErr_Clear();
        return;
    }
    const size_t before = (size_t)(self->address - (char *)whole.buf);
    const size_t length = (size_t)whole.len;
    if (before <= length && (size_t)self->nbytes <= length - before) {
        PyBuffer_Release(&self->exporter);
        self->exporter = whole;
    }
    else {
        PyBuffer_Release(&whole);
    }
}

static int
memory_fill(Memory *self, PyObject *owner, unsigned long long address, Py_ssize_t nbytes)
{
    if (address == 0) {
        if (PyObject_GetBuffer(owner, &self->exporter, PyBUF_WRITABLE) < 0) {
            return -1;
        }
        self->address = self->exporter.buf;
        self->nbytes = self->exporter.len;
        if (PyMemoryView_Check(owner)) {
            memory_hold_base(self, owner);
        }
    }
    else {
        self->address = (char *)(uintptr_t)address;
        self->nbytes = nbytes;
        self->owner = Py_NewRef(owner);
    }
    if (self->nbytes <= 0 || (uintptr_t)self->address > UINTPTR_MAX - (uintptr_t)self->nbytes) {
        PyErr_Format(PyExc_ValueError,
                     "memory of %zd bytes at address %p: give at least one byte, "
                     "and no more than the address space holds",
                     self->nbytes, self->address);
        return -1;
    }
    return 0;
}

static void
memory_hold_aliases(Memory *self, struct module_state *module)
{
    self->aliases = &module->aliases;
    self->exposed = !alias_hold(self->aliases, (uintptr_t)self->address, (size_t)self->nbytes);
}

static PyObject *
memory_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"owner", "address", "nbytes", NULL};
    PyObject *owner;
    unsigned long long address = 0;
    Py_ssize_t nbytes = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|Kn:Memory", names, &owner, &address,
                                     &nbytes)) {
        return NULL;
    }
    PyObject *module = PyType_GetModuleByDef(type, &gdsdirect_uring_cmd_module);
    Memory *self = module ? (Memory *)type->tp_alloc(type, 0) : NULL;
    if (self == NULL) {
        return NULL;
    }
    self->module = Py_NewRef(module);
    if (memory_fill(self, owner, address, nbytes) < 0) {
        Py_DECREF(self);
        return NULL;
    }
    memory_hold_aliases(self, PyModule_GetState(module));
    return (PyObject *)self;
}

/* Lets go of what keeps the range mapped. Only when nobody uses it any more. */
static void
memory_release(Memory *self)
{
    atomic_store(&self->exports, CLOSED);
    CHAOS_POINT();
    if (self->aliases != NULL) {
        alias_release(self->aliases, (uintptr_t)self->address, (size_t)self->nbytes);
        self->aliases = NULL;
    }
    CHAOS_POINT();
    PyBuffer_Release(&self->exporter);
    Py_CLEAR(self->owner);
}

static PyObject *
memory_close(Memory *self, PyObject *Py_UNUSED(ignored))
{
    Py_ssize_t users = 0;
    if (atomic_compare_exchange_strong(&self->exports, &users, CLOSED)) {
        CHAOS_POINT();
        memory_release(self);
    }
    else if (users != CLOSED) {
        PyErr_Format(PyExc_BufferError,
                     "memory at %p is in use by %zd streams, views or reads in flight: close, "
                     "release or wait for them first",
                     self->address, users);
        return NULL;
    }
    Py_RETURN_NONE;
}

static int
memory_traverse(Memory *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->exporter.obj);
    Py_VISIT(self->owner);
    Py_VISIT(self->module);
    return 0;
}

static int
memory_clear(Memory *self)
{
    /* In a garbage cycle the memory's users are garbage too, but they go first. */
    if (atomic_load(&self->exports) <= 0) {
        memory_release(self);
    }
    return 0;
}

static void
memory_dealloc(Memory *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    memory_release(self);
    Py_XDECREF(self->module);
    type->tp_free(self);
    Py_DECREF(type);
}

/* ---- Buffer protocol --------------------------------------------------------------------- */

bool
gdsdirect_memory_acquire(Memory *self)
{
    Py_ssize_t users = atomic_load(&self->exports);
    do {
        CHAOS_POINT();
        if (users == CLOSED) {
            return false;
        }
    } while (!atomic_compare_exchange_weak(&self->exports, &users, users + 1));
    return true;
}

void
gdsdirect_memory_release(Memory *self)
{
    atomic_fetch_sub(&self->exports, 1);
}

static int
memory_getbuffer(Memory *self, Py_buffer *view, int flags)
{
    if (!gdsdirect_memory_acquire(self)) {
        view->obj = NULL;
        PyErr_SetString(PyExc_ValueError, "the memory is closed");
        return -1;
    }
    if (PyBuffer_FillInfo(view, (PyObject *)self, self->address, self->nbytes, 0, flags) < 0) {
        atomic_fetch_sub(&self->exports, 1);
        return -1;
    }
    return 0;
}

static void
memory_releasebuffer(Memory *self, Py_buffer *Py_UNUSED(view))
{
    CHAOS_POINT();
    atomic_fetch_sub(&self->exports, 1);
}

/* _part(offset, nbytes, owner=None): a range of it as memory of its own, whose views keep this one from being
 * closed, and `owner`, and which tells whether it has any. Not for rings: the aliases are this one's. */
static PyObject *
memory_part(Memory *self, PyObject *args)
{
    Py_ssize_t offset, nbytes;
    PyObject *owner = NULL;
    struct module_state *state = PyModule_GetState(self->module);
    if (!PyArg_ParseTuple(args, "nn|O:_part", &offset, &nbytes, &owner)) {
        return NULL;
    }
    if (offset < 0 || nbytes < 0 || offset > self->nbytes || nbytes > self->nbytes - offset) {
        return PyErr_Format(PyExc_ValueError, "%zd bytes at %zd are outside of %zd", nbytes, offset,
                            self->nbytes);
    }
    Memory *part = (Memory *)state->memory_type->tp_alloc(state->memory_type, 0);
    if (part == NULL) {
        return NULL;
    }
    part->module = Py_NewRef(self->module);
    if (PyObject_GetBuffer((PyObject *)self, &part->exporter, PyBUF_WRITABLE) < 0) {
        Py_DECREF(part);
        return NULL;
    }
    part->address = self->address + offset;
    part->nbytes = nbytes;
    part->owner = Py_XNewRef(owner);
    return (PyObject *)part;
}

/* ---- Attributes -------------------------------------------------------------------------- */

static int
memory_is_open(Memory *self)
{
    if (atomic_load(&self->exports) == CLOSED) {
        PyErr_SetString(PyExc_ValueError, "the memory is closed");
        return 0;
    }
    CHAOS_POINT();
    return 1;
}

static PyObject *
memory_get_address(Memory *self, void *Py_UNUSED(closure))
{
    return memory_is_open(self) ? PyLong_FromVoidPtr(self->address) : NULL;
}

static PyObject *
memory_get_nbytes(Memory *self, void *Py_UNUSED(closure))
{
    return PyLong_FromSsize_t(self->nbytes);
}

static PyObject *
memory_get_closed(Memory *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(atomic_load(&self->exports) == CLOSED);
}

static PyObject *
memory_get_in_use(Memory *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(atomic_load(&self->exports) > 0);
}

static PyObject *
memory_get_exposed(Memory *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(self->exposed);
}

static Py_ssize_t
memory_length(Memory *self)
{
    return self->nbytes;
}

/* ---- Type -------------------------------------------------------------------------------- */

static PyGetSetDef memory_getset[] = {
    {"address", (getter)memory_get_address, NULL,
     "Address of the first byte in this process; ValueError once closed.", NULL},
    {"nbytes", (getter)memory_get_nbytes, NULL, "Size in bytes.", NULL},
    {"closed", (getter)memory_get_closed, NULL, "Whether close() was called.", NULL},
    {"_in_use", (getter)memory_get_in_use, NULL, "Whether it has views.", NULL},
    {"_exposed", (getter)memory_get_exposed, NULL, "Whether something is at its aliases.", NULL},
    {0},
};

PyDoc_STRVAR(memory_close_doc,
             "close($self, /)\n--\n\n"
             "Let go of the memory.\n\n"
             "Raises BufferError while a stream or a view uses it. A second call does nothing.\n");

static PyMethodDef memory_methods[] = {
    {"close", (PyCFunction)memory_close, METH_NOARGS, memory_close_doc},
    {"_part", (PyCFunction)memory_part, METH_VARARGS, NULL},
    {0},
};

static PyType_Slot memory_slots[] = {
    {Py_tp_new, memory_new},
    {Py_tp_dealloc, memory_dealloc},
    {Py_tp_traverse, memory_traverse},
    {Py_tp_clear, memory_clear},
    {Py_tp_methods, memory_methods},
    {Py_tp_getset, memory_getset},
    {Py_sq_length, memory_length},
    {Py_bf_getbuffer, memory_getbuffer},
    {Py_bf_releasebuffer, memory_releasebuffer},
    {0, NULL},
};

PyType_Spec gdsdirect_memory_spec = {
    .name = "gdsdirect._uring_cmd.Memory",
    .basicsize = sizeof(Memory),
    .flags =
        Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = memory_slots,
};
