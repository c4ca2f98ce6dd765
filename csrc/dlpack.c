/*
 * Memory as a DLPack tensor, which torch, NumPy, JAX and CuPy take without a copy; and theirs, taken.
 *
 * The structs are those of dlpack.h 1.1 (github.com/dmlc/dlpack), whose ABI is fixed within a major
 * version. A consumer that knows version 1 takes the versioned one, an older one the other.
 */
#include "module.h"

#include <stddef.h>

#define CPU_DEVICE 1 /* kDLCPU: an address of this process, whatever is behind it */
#define VERSION_MAJOR 1
#define VERSION_MINOR 1
#define MOST_DIMENSIONS 64

static const char PLAIN[] = "dltensor", VERSIONED[] = "dltensor_versioned";
static const char USED[] = "used_dltensor", USED_VERSIONED[] = "used_dltensor_versioned";
static const char KEPT[] = "gdsdirect.kept_dltensor";

#define READ_ONLY 1u /* DLPACK_FLAG_BITMASK_READ_ONLY */
#define IS_COPIED 2u /* DLPACK_FLAG_BITMASK_IS_COPIED */

struct dl_tensor {
    void *data;
    int32_t device_type;
    int32_t device_id;
    int32_t ndim;
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
    int64_t *shape;
    int64_t *strides; /* in elements */
    uint64_t byte_offset;
};

struct managed {
    struct dl_tensor tensor;
    void *context;
    void (*deleter)(struct managed *);
};

struct managed_versioned {
    uint32_t major;
    uint32_t minor;
    void *context;
    void (*deleter)(struct managed_versioned *);
    uint64_t flags;
    struct dl_tensor tensor;
};

_Static_assert(sizeof(struct dl_tensor) == 48, "DLTensor");
_Static_assert(offsetof(struct dl_tensor, shape) == 24, "DLTensor.shape");
_Static_assert(sizeof(struct managed) == 64, "DLManagedTensor");
_Static_assert(offsetof(struct managed_versioned, tensor) == 32, "DLManagedTensorVersioned");

/* One allocation for all that a consumer gets; `memory` is what it holds until it calls `deleter`. */
struct lent {
    union {
        struct managed plain;
        struct managed_versioned versioned;
    } as;
    Py_buffer memory;
    int64_t numbers[]; /* shape, then strides */
};

/* Called by a consumer from any thread, with the GIL or without. */
static void
lent_return(struct lent *lent)
{
    if (!Py_IsInitialized()) {
        return; /* nothing can be released any more, and the process ends */
    }
    PyGILState_STATE state = PyGILState_Ensure();
    PyBuffer_Release(&lent->memory);
    PyMem_Free(lent);
    PyGILState_Release(state);
}

static void
delete_plain(struct managed *managed)
{
    lent_return(managed->context);
}

static void
delete_versioned(struct managed_versioned *managed)
{
    lent_return(managed->context);
}

/* A capsule that nobody took: a consumer renames the one that it takes. */
static void
capsule_destroy(PyObject *capsule)
{
    for (int i = 0; i < 2; i++) {
        const char *name = i ? VERSIONED : PLAIN;
        if (PyCapsule_IsValid(capsule, name)) {
            lent_return(PyCapsule_GetContext(capsule));
        }
    }
}

/* Shape and strides of an array in C order, of no more than `most` elements. -1 with ValueError. */
static int
fill_numbers(int64_t *shape, Py_ssize_t ndim, PyObject *dimensions, Py_ssize_t most)
{
    int64_t elements = 1;
    bool fits = true;
    for (Py_ssize_t i = ndim; fits && i-- > 0;) {
        shape[i] = PyLong_AsSsize_t(PyTuple_GET_ITEM(dimensions, i));
        shape[ndim + i] = elements;
        fits = shape[i] >= 0 && !__builtin_mul_overflow(elements, shape[i], &elements);
    }
    if (fits && elements <= most) {
        return 0;
    }
    if (!PyErr_Occurred()) {
        PyErr_Format(PyExc_ValueError, "shape %R has no room in the memory", dimensions);
    }
    return -1;
}

static void *
fill_tensor(struct lent *lent, struct dl_tensor tensor, bool versioned)
{
    if (versioned) {
        lent->as.versioned = (struct managed_versioned){
            .major = VERSION_MAJOR,
            .minor = VERSION_MINOR,
            .context = lent,
            .deleter = delete_versioned,
            .tensor = tensor,
        };
        return &lent->as.versioned;
    }
    lent->as.plain = (struct managed){.tensor = tensor, .context = lent, .deleter = delete_plain};
    return &lent->as.plain;
}

/* dlpack(memory, offset, code, bits, shape, versioned) -> capsule: the bytes of `memory` from `offset`
 * on as an array of `shape`, in C order. As long as a consumer has it, `memory` can't be closed. */
PyObject *
gdsdirect_dlpack(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *memory, *dimensions, *capsule = NULL;
    Py_ssize_t offset;
    unsigned char code, bits;
    int versioned;
    if (!PyArg_ParseTuple(args, "OnbbO!p:dlpack", &memory, &offset, &code, &bits, &PyTuple_Type,
                          &dimensions, &versioned)) {
        return NULL;
    }
    const Py_ssize_t ndim = PyTuple_GET_SIZE(dimensions), size = bits / 8;
    if (ndim > MOST_DIMENSIONS || size < 1) {
        return PyErr_Format(PyExc_ValueError,
                            "%zd dimensions of %zd bytes an element: at most %d, "
                            "and at least 1",
                            ndim, size, MOST_DIMENSIONS);
    }
    struct lent *lent =
        PyMem_Calloc(1, sizeof(*lent) + 2 * (size_t)ndim * sizeof(lent->numbers[0]));
    if (lent == NULL) {
        return PyErr_NoMemory();
    }
    if (PyObject_GetBuffer(memory, &lent->memory, PyBUF_WRITABLE) < 0) {
        PyMem_Free(lent);
        return NULL;
    }
    const Py_ssize_t room = lent->memory.len - offset;
    if (offset < 0 || room < 0) {
        PyErr_Format(PyExc_ValueError, "offset is %zd, outside 0..%zd", offset, lent->memory.len);
    }
    else if (fill_numbers(lent->numbers, ndim, dimensions, room / size) == 0) {
        const struct dl_tensor tensor = {
            .data = (char *)lent->memory.buf + offset,
            .device_type = CPU_DEVICE,
            .ndim = (int32_t)ndim,
            .code = code,
            .bits = bits,
            .lanes = 1,
            .shape = lent->numbers,
            .strides = lent->numbers + ndim,
        };
        void *managed = fill_tensor(lent, tensor, versioned);
        capsule = PyCapsule_New(managed, versioned ? VERSIONED : PLAIN, capsule_destroy);
    }
    if (capsule != NULL) {
        PyCapsule_SetContext(capsule, lent); /* fails for what is no capsule */
    }
    else {
        PyBuffer_Release(&lent->memory);
        PyMem_Free(lent);
    }
    return capsule;
}

/* ---- Taking ------------------------------------------------------------------------------- */

/* What was taken, once nobody needs it. The context tells which struct it is. */
static void
kept_destroy(PyObject *kept)
{
    void *managed = PyCapsule_GetPointer(kept, KEPT);
    if (PyCapsule_GetContext(kept) != NULL) {
        struct managed_versioned *versioned = managed;
        if (versioned->deleter != NULL) {
            versioned->deleter(versioned);
        }
        return;
    }
    struct managed *plain = managed;
    if (plain->deleter != NULL) {
        plain->deleter(plain);
    }
}

/* Bytes of all elements, and whether they are side by side in C order. -1: more than there can be. */
static int64_t
measure_tensor(const struct dl_tensor *tensor, bool *contiguous)
{
    int64_t elements = 1, nbytes;
    *contiguous = true;
    for (int32_t i = tensor->ndim; i-- > 0;) {
        const int64_t length = tensor->shape[i];
        if (length > 1 && tensor->strides != NULL && tensor->strides[i] != elements) {
            *contiguous = false;
        }
        if (length < 0 || __builtin_mul_overflow(elements, length, &elements)) {
            return -1;
        }
    }
    const int64_t bits = (int64_t)tensor->bits * tensor->lanes;
    if (bits % 8 != 0 || __builtin_mul_overflow(elements, bits / 8, &nbytes)) {
        return -1;
    }
    return nbytes;
}

/* take_dlpack(capsule) -> (keeper, address, nbytes, contiguous, readonly): the tensor is the keeper's
 * from now on, and given back when that goes. What is a copy is told as read-only: nobody would see
 * what is written there. */
PyObject *
gdsdirect_take_dlpack(PyObject *Py_UNUSED(module), PyObject *capsule)
{
    const bool versioned = PyCapsule_IsValid(capsule, VERSIONED);
    if (!versioned && !PyCapsule_IsValid(capsule, PLAIN)) {
        return PyErr_Format(PyExc_TypeError,
                            "%R is no DLPack capsule, or one that was taken already", capsule);
    }
    void *managed = PyCapsule_GetPointer(capsule, versioned ? VERSIONED : PLAIN);
    const struct managed_versioned *known = versioned ? managed : NULL;
    if (known != NULL && known->major > VERSION_MAJOR) {
        return PyErr_Format(PyExc_BufferError, "a tensor of DLPack %u: %d is known", known->major,
                            VERSION_MAJOR);
    }
    const struct dl_tensor *tensor = known ? &known->tensor : &((struct managed *)managed)->tensor;
    bool contiguous;
    const int64_t nbytes = measure_tensor(tensor, &contiguous);
    if (nbytes < 0) {
        PyErr_SetString(PyExc_BufferError,
                        "a DLPack tensor of no whole number of bytes, or too many");
        return NULL;
    }
    PyObject *keeper = PyCapsule_New(managed, KEPT, NULL);
    if (keeper == NULL) {
        return NULL;
    }
    /* None of these can fail for a capsule that is valid. The destructor comes last, when the tensor is
     * no longer the other one's to give back. */
    PyCapsule_SetContext(keeper, versioned ? managed : NULL);
    PyCapsule_SetName(capsule, versioned ? USED_VERSIONED : USED);
    PyCapsule_SetDestructor(keeper, kept_destroy);
    const bool readonly = known != NULL && (known->flags & (READ_ONLY | IS_COPIED)) != 0;
    const unsigned long long address = (uintptr_t)tensor->data + tensor->byte_offset;
    return Py_BuildValue("NKLNN", keeper, address, (long long)nbytes, PyBool_FromLong(contiguous),
                         PyBool_FromLong(readonly));
}
