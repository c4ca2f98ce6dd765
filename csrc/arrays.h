/* Arrays of integers: what callers give by the buffer protocol, one number a command. */
#ifndef GDSDIRECT_ARRAYS_H
#define GDSDIRECT_ARRAYS_H

#include "pycompat.h"

#include <string.h>

/* Whether `format` is a native or little-endian integer code, and a signed one. */
static inline int
integer_format(const char *format, int *is_signed)
{
    if (format == NULL) {
        return 0;
    }
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    const char *native = "@=>!";
#else
    const char *native = "@=<";
#endif
    if (*format != '\0' && strchr(native, *format)) {
        format++;
    }
    if (*format == '\0' || format[1] != '\0') {
        return 0;
    }
    *is_signed = strchr("ilqn", *format) != NULL;
    return *is_signed || strchr("ILQN", *format) != NULL;
}

/* A contiguous buffer of integers of `width` bytes. Signed ones are welcome (NumPy's default) as
 * long as no value is negative: then the bytes are those of the unsigned type. */
static inline int
get_integers(PyObject *object, const char *field, Py_ssize_t width, Py_buffer *view)
{
    if (PyObject_GetBuffer(object, view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) < 0) {
        if (PyErr_ExceptionMatches(PyExc_TypeError)) {
            PyErr_Format(PyExc_TypeError, "%s must be a contiguous buffer of uint%zd, not '%.100s'",
                         field, width * 8, Py_TYPE(object)->tp_name);
        }
        return -1;
    }
    int is_signed = 0;
    if (!integer_format(view->format, &is_signed) || view->itemsize != width) {
        PyErr_Format(PyExc_TypeError, "%s has elements of format '%s', not uint%zd", field,
                     view->format ? view->format : "B", width * 8);
        goto error;
    }
    const unsigned char *bytes = view->buf;
    const Py_ssize_t top = PY_BIG_ENDIAN ? 0 : width - 1;
    for (Py_ssize_t i = 0; is_signed && i < view->len; i += width) {
        if (bytes[i + top] & 0x80) {
            PyErr_Format(PyExc_OverflowError, "%s[%zd] is negative", field, i / width);
            goto error;
        }
    }
    return 0;

error:
    PyBuffer_Release(view);
    return -1;
}

/* Whether `object` is one number for all, and not an array of them. NumPy's scalars are buffers too, of no
 * dimension, and its arrays have __index__: neither alone tells. */
static inline int
is_scalar(PyObject *object)
{
    Py_buffer view;
    if (!PyObject_CheckBuffer(object)) {
        return 1;
    }
    if (PyObject_GetBuffer(object, &view, PyBUF_FULL_RO) < 0) {
        PyErr_Clear();
        return 0;
    }
    int scalar = view.ndim == 0 && PyIndex_Check(object);
    PyBuffer_Release(&view);
    return scalar;
}

#endif
