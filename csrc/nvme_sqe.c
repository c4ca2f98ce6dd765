/*
 * _nvme_sqe: packing and unpacking read commands. Pure: no I/O, no state, builds on any system.
 */
#include <stdbool.h>
#include "arrays.h"
#include "nvme_abi.h"

/* ---- Numbers ----------------------------------------------------------------------------- */

/* Any integer as uint64. OverflowError, naming the field, where it doesn't fit in `bits`. */
static int
as_unsigned(PyObject *value, const char *field, int bits, uint64_t *out)
{
    if (PyLong_CheckExact(value)) {
        /* Far faster than PyLong_AsUnsignedLongLong before Python 3.13. */
        int beyond;
        const long long quick = PyLong_AsLongLongAndOverflow(value, &beyond);
        if (beyond == 0 && quick >= 0 && (bits == 64 || quick >> bits == 0)) {
            *out = (uint64_t)quick;
            return 0;
        }
    }
    PyObject *number = PyNumber_Index(value);
    if (number == NULL) {
        if (PyErr_ExceptionMatches(PyExc_TypeError)) {
            PyErr_Format(PyExc_TypeError, "%s must be an integer, not '%.100s'", field,
                         Py_TYPE(value)->tp_name);
        }
        return -1;
    }
    uint64_t result = PyLong_AsUnsignedLongLong(number);
    int failed = result == UINT64_MAX && PyErr_Occurred();
    if (failed || (bits < 64 && result >> bits)) {
        PyErr_Format(PyExc_OverflowError, "%s is %S, outside 0..2**%d-1", field, number, bits);
        failed = 1;
    }
    Py_DECREF(number);
    *out = result;
    return failed ? -1 : 0;
}

static int
as_blocks(PyObject *value, uint32_t *out)
{
    uint64_t blocks;
    if (as_unsigned(value, "blocks", 64, &blocks) < 0) {
        if (!PyErr_ExceptionMatches(PyExc_OverflowError)) {
            return -1;
        }
        blocks = 0; /* negative or beyond 64 bits: outside the range all the same */
    }
    if (blocks - 1 >= NVME_MAX_BLOCKS) {
        PyErr_Clear();
        PyErr_Format(PyExc_ValueError, "blocks is %S, outside 1..65536", value);
        return -1;
    }
    *out = (uint32_t)blocks;
    return 0;
}

/* ---- One command ------------------------------------------------------------------------- */

/* The four arguments that every packing function begins with, by position or by name. */
static const char *const arguments[] = {
    "namespace_id", "starting_lba", "blocks", "dest_bar1_ptr", "out",
};
static const char *const array_arguments[] = {
    "namespace_id", "starting_lbas", "blocks", "dest_bar1_ptrs", "out",
};

/* Sorts positional and keyword arguments into `into`; the first `required` must be there. */
static int
sort_arguments(const char *function, const char *const *names, int allowed, int required,
               PyObject *const *args, Py_ssize_t nargs, PyObject *keywords, PyObject **into)
{
    if (nargs > allowed) {
        PyErr_Format(PyExc_TypeError, "%s() takes %d arguments, %zd were given", function, allowed,
                     nargs);
        return -1;
    }
    for (int i = 0; i < allowed; i++) {
        into[i] = i < nargs ? args[i] : NULL;
    }
    Py_ssize_t named = keywords ? PyTuple_GET_SIZE(keywords) : 0;
    for (Py_ssize_t k = 0; k < named; k++) {
        PyObject *keyword = PyTuple_GET_ITEM(keywords, k);
        int i = 0;
        while (i < allowed && PyUnicode_CompareWithASCIIString(keyword, names[i]) != 0) {
            i++;
        }
        if (i == allowed || into[i] != NULL) {
            PyErr_Format(PyExc_TypeError, "%s() got %s argument '%U'", function,
                         i == allowed ? "an unknown" : "a second", keyword);
            return -1;
        }
        into[i] = args[nargs + k];
    }
    for (int i = 0; i < required; i++) {
        if (into[i] == NULL) {
            PyErr_Format(PyExc_TypeError, "%s() needs the argument '%s'", function, names[i]);
            return -1;
        }
    }
    return 0;
}

static PyObject *
encode_one(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs, PyObject *keywords)
{
    PyObject *given[4];
    uint64_t nsid;
    struct nvme_read read;

    if (keywords != NULL || nargs != 4) {
        if (sort_arguments("encode_nvme_read_sqe", arguments, 4, 4, args, nargs, keywords, given) <
            0) {
            return NULL;
        }
        args = given;
    }
    if (as_unsigned(args[0], "namespace_id", 32, &nsid) < 0 ||
        as_unsigned(args[1], "starting_lba", 64, &read.lba) < 0 ||
        as_blocks(args[2], &read.blocks) < 0 ||
        as_unsigned(args[3], "dest_bar1_ptr", 64, &read.address) < 0) {
        return NULL;
    }
    read.nsid = (uint32_t)nsid;

    PyObject *command = PyBytes_FromStringAndSize(NULL, WIRE_BYTES);
    if (command != NULL) {
        wire_encode((unsigned char *)PyBytes_AS_STRING(command), &read);
    }
    return command;
}

/* The 64 bytes in `object`, decoded; ValueError says what is wrong with them. */
static int
decode_object(PyObject *object, struct nvme_read *read)
{
    Py_buffer view;
    if (PyObject_GetBuffer(object, &view, PyBUF_SIMPLE) < 0) {
        return -1;
    }
    const Py_ssize_t nbytes = view.len;
    const char *wrong = nbytes == WIRE_BYTES ? wire_decode(view.buf, read) : NULL;
    PyBuffer_Release(&view);
    if (nbytes != WIRE_BYTES) {
        PyErr_Format(PyExc_ValueError, "command: an NVMe command is 64 bytes, not %zd", nbytes);
        return -1;
    }
    if (wrong != NULL) {
        PyErr_Format(PyExc_ValueError, "command: %s", wrong);
        return -1;
    }
    return 0;
}

static PyObject *
decode_one(PyObject *Py_UNUSED(module), PyObject *command)
{
    struct nvme_read read;
    if (decode_object(command, &read) < 0) {
        return NULL;
    }
    return Py_BuildValue("(IKIK)", read.nsid, (unsigned long long)read.lba, read.blocks,
                         (unsigned long long)read.address);
}

static PyObject *
kernel_command(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *command;
    unsigned int lba_size;
    struct nvme_read read;
    struct nvme_kernel_cmd cmd;
    if (!PyArg_ParseTuple(args, "OI:kernel_command", &command, &lba_size) ||
        decode_object(command, &read) < 0) {
        return NULL;
    }
    kernel_cmd_fill(&cmd, &read, read.blocks * lba_size);
    return PyBytes_FromStringAndSize((const char *)&cmd, sizeof(cmd));
}

/* ---- Many commands ----------------------------------------------------------------------- */

/* Where the packed commands go: the caller's buffer, or new bytes. */
struct output {
    PyObject *object;
    Py_buffer view;
    unsigned char *bytes;
};

static int
output_open(struct output *output, PyObject *out, Py_ssize_t commands)
{
    if (commands > PY_SSIZE_T_MAX / WIRE_BYTES) {
        PyErr_NoMemory();
        return -1;
    }
    if (out == NULL || out == Py_None) {
        output->object = PyBytes_FromStringAndSize(NULL, commands * WIRE_BYTES);
        if (output->object == NULL) {
            return -1;
        }
        output->bytes = (unsigned char *)PyBytes_AS_STRING(output->object);
        return 0;
    }
    if (PyObject_GetBuffer(out, &output->view, PyBUF_WRITABLE) < 0) {
        return -1;
    }
    if (output->view.len < commands * WIRE_BYTES) {
        PyErr_Format(PyExc_ValueError, "out holds %zd bytes, %zd commands need %zd",
                     output->view.len, commands, commands * WIRE_BYTES);
        PyBuffer_Release(&output->view);
        return -1;
    }
    output->object = Py_NewRef(out);
    output->bytes = output->view.buf;
    return 0;
}

/* The loop. Returns the index of the first block count outside 1..65536, or n. The arrays come
 * as bytes since a caller's buffer may lie at any address; memcpy is a plain load. */
static Py_ssize_t
encode_all(unsigned char *out, Py_ssize_t n, uint32_t nsid, const unsigned char *lbas,
           const unsigned char *blocks, size_t blocks_step, const unsigned char *addresses)
{
    struct nvme_read read = {.nsid = nsid};
    for (Py_ssize_t i = 0; i < n; i++) {
        memcpy(&read.lba, lbas + i * 8, 8);
        memcpy(&read.address, addresses + i * 8, 8);
        memcpy(&read.blocks, blocks + i * blocks_step, 4);
        if (read.blocks - 1 >= NVME_MAX_BLOCKS) {
            return i;
        }
        wire_encode(out + i * WIRE_BYTES, &read);
    }
    return n;
}

static PyObject *
encode_many(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs,
            PyObject *keywords)
{
    PyObject *given[5];
    uint64_t nsid;
    uint32_t one_count = 0;
    Py_buffer lbas = {0}, blocks = {0}, addresses = {0};
    struct output output = {0};
    PyObject *result = NULL;

    if (sort_arguments("encode_nvme_read_sqes", array_arguments, 5, 4, args, nargs, keywords,
                       given) < 0 ||
        as_unsigned(given[0], "namespace_id", 32, &nsid) < 0) {
        return NULL;
    }
    const int one_for_all = is_scalar(given[2]);
    if (get_integers(given[1], "starting_lbas", 8, &lbas) < 0 ||
        get_integers(given[3], "dest_bar1_ptrs", 8, &addresses) < 0 ||
        (one_for_all ? as_blocks(given[2], &one_count)
                     : get_integers(given[2], "blocks", 4, &blocks)) < 0) {
        goto done;
    }
    const Py_ssize_t n = lbas.len / 8;
    if (addresses.len / 8 != n || (!one_for_all && blocks.len / 4 != n)) {
        PyErr_Format(PyExc_ValueError,
                     "arrays of different lengths: starting_lbas %zd, blocks %zd, "
                     "dest_bar1_ptrs %zd",
                     n, one_for_all ? n : blocks.len / 4, addresses.len / 8);
        goto done;
    }
    if (output_open(&output, given[4], n) < 0) {
        goto done;
    }
    Py_ssize_t done =
        encode_all(output.bytes, n, (uint32_t)nsid, lbas.buf, one_for_all ? &one_count : blocks.buf,
                   one_for_all ? 0 : 4, addresses.buf);
    if (done == n) {
        result = Py_NewRef(output.object);
    }
    else {
        PyErr_Format(PyExc_ValueError, "blocks[%zd] is outside 1..65536", done);
    }

done:
    if (output.view.obj != NULL) {
        PyBuffer_Release(&output.view);
    }
    Py_XDECREF(output.object);
    PyBuffer_Release(&lbas);
    PyBuffer_Release(&blocks);
    PyBuffer_Release(&addresses);
    return result;
}

/* ---- Bytes instead of blocks -------------------------------------------------------------- */

/* Reads as a plan has them: arrays of bytes. */
struct byte_reads {
    Py_buffer offsets;
    Py_buffer sizes;
    Py_buffer targets;
};

static void
byte_reads_release(struct byte_reads *reads)
{
    PyBuffer_Release(&reads->offsets);
    PyBuffer_Release(&reads->sizes);
    PyBuffer_Release(&reads->targets);
}

/* `targets` may be NULL: then there are none. -1 with an exception. */
static int
byte_reads_get(struct byte_reads *reads, PyObject *offsets, PyObject *sizes, PyObject *targets)
{
    if (get_integers(offsets, "offsets", 8, &reads->offsets) < 0 ||
        get_integers(sizes, "sizes", 4, &reads->sizes) < 0 ||
        (targets != NULL && get_integers(targets, "targets", 8, &reads->targets) < 0)) {
        return -1;
    }
    const Py_ssize_t n = reads->offsets.len / 8;
    if (reads->sizes.len / 4 != n || (targets != NULL && reads->targets.len / 8 != n)) {
        PyErr_SetString(PyExc_ValueError, "arrays of different lengths");
        return -1;
    }
    return 0;
}

static uint64_t
fetch64(const Py_buffer *array, Py_ssize_t index)
{
    uint64_t value;
    memcpy(&value, (const char *)array->buf + index * 8, 8);
    return value;
}

static uint32_t
fetch32(const Py_buffer *array, Py_ssize_t index)
{
    uint32_t value;
    memcpy(&value, (const char *)array->buf + index * 4, 4);
    return value;
}

/* _survey(offsets, sizes, targets) -> what a plan's reads have in common: the bits of all offsets and sizes
 * ored, those of all targets, the smallest and the largest size, all sizes together, the first offset, and
 * where the last read ends in the file and in the buffer. */
static PyObject *
survey(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *offsets, *sizes, *targets;
    struct byte_reads reads = {0};
    if (!PyArg_ParseTuple(args, "OOO:_survey", &offsets, &sizes, &targets) ||
        byte_reads_get(&reads, offsets, sizes, targets) < 0) {
        byte_reads_release(&reads);
        return NULL;
    }
    uint64_t blocks = 0, places = 0, total = 0, first = UINT64_MAX, end = 0, last = 0;
    uint32_t least = UINT32_MAX, most = 0;
    for (Py_ssize_t i = 0; i < reads.offsets.len / 8; i++) {
        const uint64_t offset = fetch64(&reads.offsets, i), target = fetch64(&reads.targets, i);
        const uint32_t nbytes = fetch32(&reads.sizes, i);
        /* What doesn't fit 64 bits is as bad as what almost doesn't. */
        const uint64_t stop = offset + nbytes < offset ? UINT64_MAX : offset + nbytes;
        const uint64_t place = target + nbytes < target ? UINT64_MAX : target + nbytes;
        blocks |= offset | nbytes;
        places |= target;
        total += nbytes;
        least = nbytes < least ? nbytes : least;
        most = nbytes > most ? nbytes : most;
        first = offset < first ? offset : first;
        end = stop > end ? stop : end;
        last = place > last ? place : last;
    }
    byte_reads_release(&reads);
    return Py_BuildValue("(KKIIKKKK)", (unsigned long long)blocks, (unsigned long long)places,
                         least, most, (unsigned long long)total, (unsigned long long)first,
                         (unsigned long long)end, (unsigned long long)last);
}

/* Where bytes of a file lie on its device. */
struct extent {
    uint64_t logical;
    uint64_t physical;
    uint64_t length;
};

/* The last extent that begins at `offset` or before it, or the first. */
static const struct extent *
extent_before(const struct extent *extents, size_t n, uint64_t offset)
{
    size_t low = 0, high = n;
    while (high - low > 1) {
        const size_t middle = low + (high - low) / 2;
        if (extents[middle].logical <= offset) {
            low = middle;
        }
        else {
            high = middle;
        }
    }
    return &extents[low];
}

/* False: a read isn't inside one extent. */
static bool
locate_all(uint64_t *out, const struct byte_reads *reads, const struct extent *extents, size_t n)
{
    for (Py_ssize_t i = 0; i < reads->offsets.len / 8; i++) {
        const uint64_t offset = fetch64(&reads->offsets, i);
        const struct extent *extent = extent_before(extents, n, offset);
        const uint64_t into = offset - extent->logical; /* before it: wraps, huge */
        if (into >= extent->length || fetch32(&reads->sizes, i) > extent->length - into) {
            return false;
        }
        out[i] = extent->physical + into;
    }
    return true;
}

/* _locate(extents, offsets, sizes) -> where these bytes of a file lie on its device, as bytes of uint64; or
 * None if a read isn't inside one extent. `extents` has for each, in order of the first: where in the file,
 * where on the device, how many bytes. */
static PyObject *
locate(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *given, *offsets, *sizes, *result = NULL;
    Py_buffer extents;
    struct byte_reads reads = {0};
    if (!PyArg_ParseTuple(args, "OOO:_locate", &given, &offsets, &sizes) ||
        get_integers(given, "extents", 8, &extents) < 0) {
        return NULL;
    }
    const size_t count = (size_t)extents.len / sizeof(struct extent);
    if (byte_reads_get(&reads, offsets, sizes, NULL) == 0) {
        result = PyBytes_FromStringAndSize(NULL, reads.offsets.len);
        if (result != NULL && (count == 0 || !locate_all((uint64_t *)PyBytes_AS_STRING(result),
                                                         &reads, extents.buf, count))) {
            Py_SETREF(result, Py_NewRef(Py_None));
        }
    }
    byte_reads_release(&reads);
    PyBuffer_Release(&extents);
    return result;
}

/* ---- Module ------------------------------------------------------------------------------ */

PyDoc_STRVAR(
    encode_one_doc,
    "encode_nvme_read_sqe($module, /, namespace_id, starting_lba, blocks, dest_bar1_ptr)\n--\n\n"
    "Pack one NVMe read command into 64 bytes.\n\n"
    "Little-endian: opcode 0x02 at byte 0, namespace_id (uint32) at 4, dest_bar1_ptr (uint64, an\n"
    "address in this process) at 32, starting_lba (uint64) at 40, blocks - 1 (uint32) at 48, all\n"
    "else 0. This is the package's own format: AsyncUringStream.submit_nvme_passthrough checks it\n"
    "and rewrites it into the kernel's struct nvme_uring_cmd.\n\n"
    "Raises ValueError where blocks is outside 1..65536 (NLB has 16 bits, NVM Command Set\n"
    "Specification, Read command), OverflowError where a value doesn't fit its field.\n\n"
    ">>> encode_nvme_read_sqe(1, 8, 1, 0x7F0000000000)[:8].hex()\n"
    "'0200000001000000'\n");

PyDoc_STRVAR(
    encode_many_doc,
    "encode_nvme_read_sqes($module, /, namespace_id, starting_lbas, blocks, dest_bar1_ptrs, "
    "out=None)\n--\n\n"
    "Pack n NVMe read commands into n * 64 bytes, each as encode_nvme_read_sqe does.\n\n"
    "starting_lbas and dest_bar1_ptrs are contiguous buffers of n 64-bit integers (array('Q'),\n"
    "NumPy uint64 or int64 without negative values), blocks an int for all or a buffer of n 32-bit\n"
    "integers. Into out, a writable buffer of at least n * 64 bytes, where it is given, and returns\n"
    "it; else returns new bytes. After an error the contents of out are undefined.\n\n"
    ">>> from array import array\n"
    ">>> lbas, destinations = array('Q', [0, 8]), array('Q', [4096, 8192])\n"
    ">>> len(encode_nvme_read_sqes(1, lbas, 8, destinations))\n"
    "128\n");

PyDoc_STRVAR(
    decode_one_doc,
    "decode_nvme_read_sqe($module, command, /)\n--\n\n"
    "Unpack a 64-byte read command: (namespace_id, starting_lba, blocks, dest_bar1_ptr).\n\n"
    "Raises ValueError for what encode_nvme_read_sqe can't have made.\n\n"
    ">>> decode_nvme_read_sqe(encode_nvme_read_sqe(1, 8, 2, 4096))\n"
    "(1, 8, 2, 4096)\n");

PyDoc_STRVAR(kernel_command_doc,
             "_kernel_command($module, command, lba_size, /)\n--\n\n"
             "The struct nvme_uring_cmd, 72 bytes, that a ring sends for a 64-byte command.\n");

static PyMethodDef methods[] = {
    {"encode_nvme_read_sqe", (PyCFunction)(void (*)(void))encode_one, METH_FASTCALL | METH_KEYWORDS,
     encode_one_doc},
    {"encode_nvme_read_sqes", (PyCFunction)(void (*)(void))encode_many,
     METH_FASTCALL | METH_KEYWORDS, encode_many_doc},
    {"decode_nvme_read_sqe", decode_one, METH_O, decode_one_doc},
    {"_locate", locate, METH_VARARGS, NULL},
    {"_survey", survey, METH_VARARGS, NULL},
    {"_kernel_command", kernel_command, METH_VARARGS, kernel_command_doc},
    {0},
};

static int
module_exec(PyObject *module)
{
    return PyModule_AddIntConstant(module, "NVME_CMD_READ", NVME_CMD_READ);
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, module_exec},
    SLOT_PER_INTERPRETER_GIL,
    SLOT_NO_GIL,
    {0, NULL},
};

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,
    .m_name = "gdsdirect._nvme_sqe",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC
PyInit__nvme_sqe(void)
{
    return PyModuleDef_Init(&module_def);
}
