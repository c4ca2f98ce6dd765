/*
 * What the files of _uring_cmd share: the module's state and the two small types, the memory that
 * commands write into and the source that they read from.
 */
#ifndef GDSDIRECT_MODULE_H
#define GDSDIRECT_MODULE_H

#include "pycompat.h"

#include "alias.h"
#include "chaos.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* Requests that were given up and have commands in flight: see request.h. */
struct given_up {
    pthread_mutex_t lock;
    struct request *first;
    _Atomic size_t count;
    pid_t process;
};

/* Rings of the kernel's that nothing needs now: making one, and its end, take longer than a small read, and a
 * user's locked memory is given back some time after that end. Those of default depth and flags, without
 * files or buffers. */
#define IDLE_RINGS 16

struct io_uring;

struct idle_rings {
    pthread_mutex_t lock;
    pid_t process;
    unsigned count;
    struct io_uring *rings; /* IDLE_RINGS of them; NULL: none yet */
};

/* The threads that do jobs, and what they are to do: see jobs.h. */
struct workers {
    pthread_mutex_t lock;
    pthread_cond_t work; /* there is more to do */
    pthread_cond_t done; /* a job, or a thread, has ended */
    pid_t process;
    struct job *first;
    struct job *last;
    unsigned count;
    unsigned idle;
    bool ending;
};

void gdsdirect_workers_init(struct workers *workers);
void gdsdirect_workers_end(struct workers *workers);

/* Methods of more arguments than one, as PyMethodDef has them. */
#define FASTCALL(function) ((PyCFunction)(void (*)(void))(function))
#define KEYWORDS(function) FASTCALL(function)

struct module_state {
    PyTypeObject *memory_type;
    PyTypeObject *source_type;
    PyTypeObject *ring_type;
    PyTypeObject *request_type;
    PyTypeObject *watch_type;
    PyTypeObject *then_type;
    PyTypeObject *slots_type;
    PyTypeObject *slot_type;
    PyTypeObject *job_type;
    PyObject *source_name;     /* "_source": where a Namespace keeps its Source */
    PyObject *name_name;       /* "name" */
    _Atomic uint32_t closings; /* sources closed so far: rings then look which of theirs are */
    struct aliases aliases;
    struct given_up given_up;
    struct idle_rings idle;
    struct workers workers;
};

extern struct PyModuleDef gdsdirect_uring_cmd_module;
extern PyType_Spec gdsdirect_memory_spec, gdsdirect_source_spec, gdsdirect_ring_spec,
    gdsdirect_request_spec, gdsdirect_watch_spec;

/* Memory: a fixed range of addresses and whatever keeps it mapped. A ring reaches it through the
 * buffer protocol alone, so that its export is what forbids close() while commands are in flight. */
typedef struct {
    PyObject_HEAD
    char *address;
    Py_ssize_t nbytes;
    Py_buffer exporter;      /* obj is NULL where somebody else mapped the address */
    PyObject *owner;         /* then this keeps it mapped */
    PyObject *module;        /* holds the next one: a type may let go of it before its objects go */
    struct aliases *aliases; /* where its own are held free; NULL: they are not yet, or no more */
    bool exposed;            /* something else is at some of them */
    _Atomic Py_ssize_t exports; /* -1: closed */
} Memory;

/* Between acquire and release it isn't closed: a read is in flight. False: it is closed already. Neither runs
 * Python code, so both may be called under a ring's lock. */
bool gdsdirect_memory_acquire(Memory *memory);
void gdsdirect_memory_release(Memory *memory);

#define STREAM_OF_ANOTHER_PROCESS \
    "the stream belongs to the process that made it, and this one is its fork: make a stream of " \
    "your own here"

/* Source: an open file, and for an NVMe namespace the bounds that its commands are held to. */
typedef struct {
    PyObject_HEAD
    int fd;
    bool may_block; /* a read may block whoever submits it: see waits_for_others in source.c */
    bool is_direct; /* opened with O_DIRECT, and not in memory: see reads_directly in source.c */
    bool is_nvme;
    _Atomic uint32_t users; /* rings that hold it, and SOURCE_CLOSED */
    uint32_t nsid;
    uint32_t lba_shift;
    uint32_t max_transfer;  /* bytes */
    uint32_t safe_transfer; /* bytes that the kernel maps whatever pages they are in */
    uint32_t metadata_size;
    uint64_t capacity; /* blocks */
    PyObject *path;
    PyObject *module; /* a type may let go of it before its objects go */
} Source;

#define SOURCE_CLOSED 0x80000000u

static inline bool
source_is_closed(const Source *source)
{
    return atomic_load(&source->users) & SOURCE_CLOSED;
}

/* Between acquire and release the descriptor stays open, whoever calls close(). False: it is
 * closed already. Neither runs Python code, so both may be called under a ring's lock. */
bool gdsdirect_source_acquire(Source *source);
void gdsdirect_source_release(Source *source);

/* ValueError for a source that is closed. Returns NULL. */
PyObject *gdsdirect_source_raise_closed(const Source *source);

/* A Source on a descriptor of a file just opened with `flags`, which it owns from then on. NULL with an
 * exception, and then the descriptor is the caller's still. */
Source *gdsdirect_source_own_fd(PyTypeObject *type, int fd, int flags, PyObject *path);

void gdsdirect_idle_rings_free(struct idle_rings *idle);

PyObject *gdsdirect_open_source(PyObject *module, PyObject *args);
PyObject *gdsdirect_open_sources(PyObject *module, PyObject *args);
PyObject *gdsdirect_read_sources(PyObject *module, PyObject *args);
PyObject *gdsdirect_deadline(PyObject *module, PyObject *timeout);
PyObject *gdsdirect_nvme_identify(PyObject *module, PyObject *args);
PyObject *gdsdirect_ask_io_uring(PyObject *module, PyObject *ignored);
PyObject *gdsdirect_direct_alignment(PyObject *module, PyObject *args);
PyObject *gdsdirect_dlpack(PyObject *module, PyObject *args);
PyObject *gdsdirect_take_dlpack(PyObject *module, PyObject *capsule);

#endif
