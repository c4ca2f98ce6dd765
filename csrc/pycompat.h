/* Every difference between CPython versions, and nowhere else. Python.h comes through here. */
#ifndef GDSDIRECT_PYCOMPAT_H
#define GDSDIRECT_PYCOMPAT_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#if PY_VERSION_HEX < 0x030B0000
#error "gdsdirect needs CPython 3.11 or later"
#endif

/* Module slots that say what a module's own locks allow: its last two, in this order. Where CPython
 * does not know one, the slots end there. */
#if PY_VERSION_HEX >= 0x030C0000
#define SLOT_PER_INTERPRETER_GIL \
    {Py_mod_multiple_interpreters, Py_MOD_PER_INTERPRETER_GIL_SUPPORTED}
#else
#define SLOT_PER_INTERPRETER_GIL {0, NULL}
#endif

#if PY_VERSION_HEX >= 0x030D0000
#define SLOT_NO_GIL {Py_mod_gil, Py_MOD_GIL_NOT_USED}
#else
#define SLOT_NO_GIL {0, NULL}
#endif

#if PY_VERSION_HEX < 0x030D0000
#define PyLong_AsInt _PyLong_AsInt
#endif

/* What a weak reference is of, as a new reference; NULL without an exception: it is gone. */
static inline PyObject *
compat_weakref_get(PyObject *weak)
{
    PyObject *object = NULL;
#if PY_VERSION_HEX >= 0x030D0000
    if (PyWeakref_GetRef(weak, &object) < 0) {
        PyErr_Clear();
    }
#else
    object = PyWeakref_GetObject(weak);
    object = object == Py_None ? NULL : Py_XNewRef(object);
#endif
    return object;
}

/* Adds a note (PEP 678) to the exception that is set. */
static inline void
compat_add_note(PyObject *note)
{
#if PY_VERSION_HEX >= 0x030C0000
    PyObject *exception = PyErr_GetRaisedException();
#else
    PyObject *type, *exception, *traceback;
    PyErr_Fetch(&type, &exception, &traceback);
    PyErr_NormalizeException(&type, &exception, &traceback);
#endif
    PyObject *result = note ? PyObject_CallMethod(exception, "add_note", "O", note) : NULL;
    Py_XDECREF(result);
    PyErr_Clear();
#if PY_VERSION_HEX >= 0x030C0000
    PyErr_SetRaisedException(exception);
#else
    PyErr_Restore(type, exception, traceback);
#endif
}

#endif
