/*
 * The module _uring_cmd, and nothing else.
 */
#include "handout.h"
#include "jobs.h"

static PyTypeObject *
add_type(PyObject *module, PyType_Spec *spec)
{
    PyTypeObject *type = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    if (type != NULL && PyModule_AddType(module, type) < 0) {
        Py_CLEAR(type);
    }
    return type;
}

static int
module_exec(PyObject *module)
{
    struct module_state *state = PyModule_GetState(module);
    pthread_mutex_init(&state->given_up.lock, NULL);
    pthread_mutex_init(&state->idle.lock, NULL);
    gdsdirect_workers_init(&state->workers);
    if (!alias_init(&state->aliases)) {
        PyErr_NoMemory();
        return -1;
    }
    if ((state->source_name = PyUnicode_InternFromString("_source")) == NULL ||
        (state->name_name = PyUnicode_InternFromString("name")) == NULL ||
        (state->memory_type = add_type(module, &gdsdirect_memory_spec)) == NULL ||
        (state->source_type = add_type(module, &gdsdirect_source_spec)) == NULL ||
        (state->ring_type = add_type(module, &gdsdirect_ring_spec)) == NULL ||
        (state->request_type = add_type(module, &gdsdirect_request_spec)) == NULL ||
        (state->watch_type = add_type(module, &gdsdirect_watch_spec)) == NULL ||
        (state->then_type = add_type(module, &gdsdirect_then_spec)) == NULL ||
        (state->slots_type = add_type(module, &gdsdirect_slots_spec)) == NULL ||
        (state->slot_type = add_type(module, &gdsdirect_slot_spec)) == NULL ||
        (state->job_type = add_type(module, &gdsdirect_job_spec)) == NULL) {
        return -1;
    }
    PyTypeObject *turn = add_type(module, &gdsdirect_turn_spec);
    PyTypeObject *handout = turn ? add_type(module, &gdsdirect_handout_spec) : NULL;
    Py_XDECREF(turn); /* the module has both */
    Py_XDECREF(handout);
    return handout != NULL ? 0 : -1;
}

static int
module_traverse(PyObject *module, visitproc visit, void *arg)
{
    struct module_state *state = PyModule_GetState(module);
    Py_VISIT(state->memory_type);
    Py_VISIT(state->source_type);
    Py_VISIT(state->ring_type);
    Py_VISIT(state->request_type);
    Py_VISIT(state->watch_type);
    Py_VISIT(state->then_type);
    Py_VISIT(state->slots_type);
    Py_VISIT(state->slot_type);
    Py_VISIT(state->job_type);
    return 0;
}

static int
module_clear(PyObject *module)
{
    struct module_state *state = PyModule_GetState(module);
    Py_CLEAR(state->source_name);
    Py_CLEAR(state->name_name);
    Py_CLEAR(state->memory_type);
    Py_CLEAR(state->source_type);
    Py_CLEAR(state->ring_type);
    Py_CLEAR(state->request_type);
    Py_CLEAR(state->watch_type);
    Py_CLEAR(state->then_type);
    Py_CLEAR(state->slots_type);
    Py_CLEAR(state->slot_type);
    Py_CLEAR(state->job_type);
    return 0;
}

static void
module_free(void *module)
{
    struct module_state *state = PyModule_GetState(module);
    module_clear(module);
    alias_free(&state->aliases);
    gdsdirect_idle_rings_free(&state->idle);
    gdsdirect_workers_end(&state->workers);
}

static PyMethodDef module_methods[] = {
    {"nvme_identify", gdsdirect_nvme_identify, METH_VARARGS,
     "nvme_identify(fd, cns, nsid) -> bytes: the Identify command's 4096 bytes."},
    {"ask_io_uring", gdsdirect_ask_io_uring, METH_NOARGS,
     "ask_io_uring() -> dict: by feature 0, or the errno that the kernel refuses it with."},
    {"dlpack", gdsdirect_dlpack, METH_VARARGS,
     "dlpack(memory, offset, code, bits, shape, versioned) -> a DLPack capsule of part of memory."},
    {"take_dlpack", gdsdirect_take_dlpack, METH_O,
     "take_dlpack(capsule) -> (keeper, address, nbytes, contiguous, readonly) of a DLPack capsule."},
    {"deadline", gdsdirect_deadline, METH_O,
     "deadline(timeout): None or seconds, as a moment of time.monotonic_ns() or None."},
    {"open_source", gdsdirect_open_source, METH_VARARGS,
     "open_source(name, flags, path) -> Source: open(2) of name, which messages call path."},
    {"open_sources", gdsdirect_open_sources, METH_VARARGS,
     "open_sources(paths, flags) -> a Job: for each its path, a Source or None, and its size."},
    {"read_sources", gdsdirect_read_sources, METH_VARARGS,
     "read_sources(memory, sources, sizes, targets) -> a Job: for each the bytes read, or -errno."},
    {"direct_alignment", gdsdirect_direct_alignment, METH_VARARGS,
     "direct_alignment(fd) -> (memory, offset): bytes that O_DIRECT wants multiples of; or None."},
    {0},
};

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
    SLOT_PER_INTERPRETER_GIL,
    SLOT_NO_GIL,
    {0, NULL},
};

struct PyModuleDef gdsdirect_uring_cmd_module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "gdsdirect._uring_cmd",
    .m_size = sizeof(struct module_state),
    .m_methods = module_methods,
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC
PyInit__uring_cmd(void)
{
    return PyModuleDef_Init(&gdsdirect_uring_cmd_module);
}
