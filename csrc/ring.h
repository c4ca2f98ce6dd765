/*
 * The Ring: its state, its lock, and what its files ask of one another.
 *
 *   submit.c      commands in: checked, rewritten, sent
 *   reap.c        completions out: consumed, waited for, handed over
 *   uring_cmd.c   life and death of a ring, and the module
 *
 * Locking. `lock` guards every field below it, and liburing's struct, whose submission and
 * completion queues take one thread at a time. It is held across the system call that submits, and
 * never across one that waits. With the lock held no Python code runs: nothing is raised, allocated
 * or released, since that can call back into the same ring. So functions that end in `_locked`
 * answer with an `outcome` code that ring_raise turns into an exception after the lock is free.
 *
 * Waiting. One thread at a time, the leader, waits in the kernel; all others, the followers, wait
 * on the futex word `news`, which the leader bumps when it comes back. Only then can no CQE be
 * consumed behind the back of one who is about to wait for it. Both kinds of wait end with EINTR
 * when a signal arrives.
 */
#ifndef GDSDIRECT_RING_H
#define GDSDIRECT_RING_H

#include "module.h"

#include <liburing.h>
#include <pthread.h>

#include "inflight.h"

/* How a `_locked` function ended; above 0: an errno of the system call in `failed_call`. */
enum {
    DONE = 0,
    RAISED = -1, /* by a signal handler: the exception is set */
    STREAM_CLOSED = -2,
    SOURCE_IS_CLOSED = -3,
    NO_MEMORY = -4,
    NO_DESCRIPTOR = -5,
};

/* Moments of CLOCK_MONOTONIC, in ns. */
#define NO_DEADLINE INT64_MAX
#define DEADLINE_PASSED INT64_C(0)

struct counters {
    uint64_t submitted;
    uint64_t registered; /* of those submitted: into a registered buffer */
    uint64_t completed;
    uint64_t failed;
    uint64_t nbytes;
};

enum ring_state { RING_OPEN, RING_CLOSING, RING_CLOSED };

typedef struct {
    PyObject_HEAD
    struct module_state *module;
    Py_buffer memory;    /* held until nothing is in flight; its owner can't go before */
    uint32_t registered; /* buffers registered with the kernel, each of 1 GiB but the last; or 0 */
    int register_errno;  /* why there are none */
    _Atomic uint32_t registered_most; /* bytes of a passthrough command that goes into one */
    bool registers_files;             /* the ring has a table of REGISTERED_FILES files */
    unsigned enter_flags;             /* IORING_ENTER_REGISTERED_RING, or 0 */
    unsigned setup_flags;
    pthread_t owner_thread; /* the one that may call, with single_thread */
    char *fork_mark;        /* a page that holds 1, and 0 in a child after fork */

    pthread_mutex_t lock;
    _Atomic int state; /* enum ring_state; changed with the lock held */
    struct io_uring ring;
    struct inflight table;
    struct counters counters[WAYS];
    uint64_t next_token;
    uint32_t closings_seen; /* of module->closings */

    bool has_leader;
    bool shared;            /* a second thread has waited: from then on leaders wait for one CQE */
    bool leader_called;     /* it was sent enough CQEs of our own to come back */
    unsigned leader_awaits; /* CQEs that the leader waits for */
    unsigned followers;
    _Atomic uint32_t news;

    int event_fd; /* readable: outcomes wait in the table. -1 until fileno() is asked */
    int epoll_fd; /* event_fd and the arrivals' descriptor together */
    bool event_is_set;

    int arrival_fd; /* signalled by the kernel: see arrival_fd_locked. -1 until it is needed */
    bool arrival_consumed; /* since arrival_fd was cleared */

    int *watchers; /* eventfds, one for each event loop that waits: see ring_tell_watchers_locked */
    size_t watcher_count;
} Ring;

/* In user_data of what the ring submits for itself. No slot has this index. */
#define OWN_ID UINT32_MAX

/* The lock. Taken with the GIL held, which is let go if it must be waited for. */
static inline void
ring_lock(Ring *self)
{
    if (pthread_mutex_trylock(&self->lock) != 0) {
        Py_BEGIN_ALLOW_THREADS
        pthread_mutex_lock(&self->lock);
        Py_END_ALLOW_THREADS
    }
}

/* uring_cmd.c */

/* At the head of every method that uses the ring: 0, or -1 with an exception if it is closed, in a
 * forked child, and in another thread than the one that a single_thread ring belongs to. */
int ring_check_caller(Ring *self);

/* Frees the lock, lets go of sources that nothing needs any more, and sets the descriptors that say
 * whether completions wait. */
void ring_unlock(Ring *self);

/* The exception for an outcome other than DONE. Returns NULL. */
PyObject *ring_raise(int outcome, const char *call);

/* OSError for a system call that failed, with the words of errors.py. `path` may be NULL. */
void ring_raise_errno(int number, const char *call, PyObject *path);

/* submit.c */

/* Takes the files of closed sources out of the ring's table: the kernel holds each as long as it is
 * there. At the head of calls that submit or reap. */
void ring_forget_closed_locked(Ring *self);

PyObject *ring_submit_nvme_passthrough(Ring *self, PyObject *const *args, Py_ssize_t nargs,
                                       PyObject *keywords);
PyObject *ring_submit_nvme_passthroughs(Ring *self, PyObject *args, PyObject *kwargs);
PyObject *ring_submit_read(Ring *self, PyObject *args, PyObject *kwargs);
PyObject *ring_submit_read_fixed(Ring *self, PyObject *args, PyObject *kwargs);
PyObject *ring_submit_reads(Ring *self, PyObject *args, PyObject *kwargs);
PyObject *ring_submit_reads_fixed(Ring *self, PyObject *args, PyObject *kwargs);
PyObject *ring_submit_files(Ring *self, PyObject *args);

/* Sends what the ring needs for itself, `count` times: IORING_OP_NOP to wake the leader,
 * IORING_OP_ASYNC_CANCEL to have everything cancelled. */
void ring_send_own_locked(Ring *self, uint8_t opcode, unsigned count);

/* Whether a command that came back with `res` was sent again.
 *
 * Without the registered buffer: the kernel maps that for NVMe by its pages, all that lie behind the
 * target (6.1, EINVAL) or those of the command (later, ENOMEM), and refuses more than the drive's queue
 * has segments; ordinary memory it maps by runs of pages, far fewer. Longer commands then go that way
 * at once.
 *
 * As it was, after EFAULT, some times: what finds the drive's queue frozen (a reset, a rescan) or full
 * the kernel hands to a worker thread. One that was made while this process returned from an interrupt
 * has no number of a system call in its registers, but -1; the kernel takes it for one of the x32 ABI,
 * and cuts the target's address to 32 bits (nvme_to_user_ptr; seen on 6.1, 6.12 and 7.3), where alias.h
 * has seen to it that nothing is. */
bool ring_resend_locked(Ring *self, struct slot *slot, uint64_t id, int32_t res);

/* reap.c */

/* Whether the kernel has CQEs that are not in the CQ yet, which it posts when it is entered. */
static inline bool
ring_has_deferred(const Ring *self)
{
    return IO_URING_READ_ONCE(*self->ring.sq.kflags) & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW);
}

/* Consumes the CQEs that are there. */
void ring_reap_locked(Ring *self);

/* Waits, without the lock, until something has changed: a CQE came, time is up, or another thread
 * did something. The caller looks again. `awaits` is how many CQEs it is waiting for. */
int ring_wait_locked(Ring *self, unsigned awaits, int64_t deadline);

/* Makes the leader come back, whether it sleeps in the kernel or is just about to: by as many CQEs
 * of our own as it waits for. */
void ring_call_leader_locked(Ring *self);

/* Wakes the event loops that wait for completions, to look again: there are more, nothing is left to
 * wait for, or the stream was closed. Each has an eventfd of its own, since one that was shared would
 * be cleared by the first to look. A CQE that nobody has consumed they see on the ring's descriptor. */
void ring_tell_watchers_locked(Ring *self);

/* Wakes the followers, to look again. */
void ring_tell_followers_locked(Ring *self);

/* None or seconds, as a moment of CLOCK_MONOTONIC in ns. -1 with an exception. */
int ring_deadline(PyObject *timeout, int64_t *deadline);
int64_t ring_now(void);

PyObject *ring_take(Ring *self, PyObject *args);
PyObject *ring_wait_into(Ring *self, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords);
PyObject *ring_look(Ring *self, PyObject *ignored);

#endif
