/*
 * The Ring: its state, its lock, its errors, and its descriptors for event loops.
 *
 * What is done with a ring is in the rooms above this one. Each calls those below it, and none above:
 *
 *   ringobject.c     the type: made, closed and collected
 *   requestobject.c  requests: made, carried out, awaited
 *   submit.c         what callers submit
 *   check.c          every bound that a command is held to
 *   batch.c          checked commands, sent as room allows
 *   reap.c           completions out: consumed, waited for, handed over
 *   carry.c          requests carried out: from their start to their last completion
 *   sqe.h            an SQE made, sent, and sent again
 *
 * Locking. `lock` guards every field below it, and liburing's struct, whose submission and
 * completion queues take one thread at a time. It is held across the system call that submits, and
 * never across one that waits. With the lock held no Python code runs: nothing is raised, allocated
 * or released, since that can call back into the same ring. So functions that end in `_locked`
 * answer with an `outcome` code that ring_raise turns into an exception after the lock is free.
 *
 * Waiting. One thread at a time, the leader, waits in the kernel. Each of the others, the followers,
 * waits on a futex word of its own, in a list of the ring's. So nobody can consume a CQE unnoticed
 * while another thread is about to wait for it. A thread that consumes completions wakes the followers
 * that wait for them. A thread that stops leading, or that is woken and leaves without leading, wakes
 * another to lead. Both kinds of wait end when a signal arrives, and after a second, to look for a
 * signal that came just before. docs/engine.md has all of it.
 */
#ifndef GDSDIRECT_RING_H
#define GDSDIRECT_RING_H

#include "module.h"

#include <liburing.h>
#include <pthread.h>

#include "request.h"

/* How a `_locked` function ended; above 0: an errno of the system call in `failed_call`. */
enum {
    DONE = 0,
    RAISED = -1, /* by a signal handler: the exception is set */
    STREAM_CLOSED = -2,
    SOURCE_IS_CLOSED = -3,
    NO_MEMORY = -4,
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

/* A command that was to bring `expected` bytes has come back with `nbytes`. */
static inline void
counters_land(struct counters *counters, uint32_t nbytes, uint32_t expected)
{
    counters->nbytes += nbytes;
    counters->completed += nbytes == expected;
    counters->failed += nbytes != expected;
}

enum ring_state { RING_OPEN, RING_CLOSING, RING_CLOSED };

/* A thread that waits while another one leads. It lives on that thread's stack, and the ring lists it. */
struct follower {
    struct follower *next;
    const struct request
        *request; /* it waits for this one; NULL: for completions or any other change */
    _Atomic uint32_t woken;
};

/* An event loop that waits: shared by the ring and the loop's Watch, and freed by the last of them. */
struct watch {
    struct watch *next;
    int event_fd;
    _Atomic uint32_t holders;
    _Atomic bool unwatched;   /* its loop is through with it */
    struct request *finished; /* requests whose future is to be set, by `next` */
};

/* Slots of SLOT_BYTES that aligned reads go into, where what is wanted of them is not aligned. */
#define BOUNCE_SLOTS 32
#define BOUNCE_SLOT_BYTES (64u << 10) /* gdsdirect/plan.py has it too */

struct bounce_memory {
    Memory *memory; /* NULL: there is none yet. Held as the ring's own memory is */
    Py_buffer export;
    uint16_t registered; /* the registered buffer that it is, or NOT_REGISTERED */
    uint8_t free[BOUNCE_SLOTS];
    uint8_t free_count;
};

typedef struct {
    PyObject_HEAD
    struct module_state *module;
    Memory *memory;      /* its numbers are good until the ring is freed */
    PyObject *lender;    /* of a shared ring: a weak reference to its buffer */
    Py_buffer export;    /* of the memory, which can't be closed before this is released */
    uint32_t registered; /* buffers registered with the kernel, each of 1 GiB but the last; or 0 */
    int register_errno;  /* why there are none */
    _Atomic uint32_t registered_most; /* bytes of a passthrough command that goes into one */
    bool shared;                      /* all reads of files into a buffer go by it */
    bool registers_files;             /* the ring has a table of REGISTERED_FILES files */
    unsigned enter_flags;             /* IORING_ENTER_REGISTERED_RING, or 0 */
    unsigned setup_flags;
    pthread_t owner_thread; /* the one that may call, with single_thread */
    char *fork_mark;        /* a page that holds 1, and 0 in a child after fork */

    pthread_mutex_t lock;
    _Atomic int state;       /* enum ring_state; changed with the lock held */
    pthread_t closer;        /* the thread that closed it */
    _Atomic bool given_back; /* and has let go of all that it had */
    struct io_uring ring;
    struct inflight table;
    struct counters counters[WAYS];
    uint64_t next_token;
    uint32_t closings_seen; /* of module->closings */

    struct request *first_queued; /* requests with commands to send, in turn; by `next` */
    struct request *last_queued;
    uint32_t requests; /* started and not finished */
    uint32_t unowned;  /* references to this ring that finished requests had, to be released */
    struct request *to_free; /* finished, and nobody has them; by `next` */
    struct bounce_memory bounce;
    struct request
        remnant; /* the commands in flight, once the ring's user has left it: see carry.h */

    bool has_leader;
    bool leader_called;     /* it was sent as many CQEs of our own as bring it back */
    unsigned leader_awaits; /* CQEs that the leader waits for */
    struct follower *followers;

    int event_fd; /* readable: outcomes wait in the table. -1 until fileno() is asked */
    int epoll_fd; /* event_fd and the arrivals' descriptor together */
    bool event_is_set;

    int arrival_fd; /* signalled by the kernel: see arrival_fd_locked. -1 until it is needed */
    bool arrival_consumed; /* since arrival_fd was cleared */

    struct watch *watches; /* one for each event loop that waits, by `next` */
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

/* Whether the kernel has CQEs that are not in the CQ yet, which it posts when it is entered. */
static inline bool
ring_has_deferred(const Ring *self)
{
    return IO_URING_READ_ONCE(*self->ring.sq.kflags) & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW);
}

/* Whether this process is a fork of the ring's. */
bool ring_is_forked(const Ring *self);

/* 0, or -1 with an exception in a forked child, where the lock may be one that a thread of the
 * parent's holds for ever. */
int ring_check_process(const Ring *self);

/* Whether this thread may enter the kernel with the ring at all. */
int ring_check_thread(const Ring *self);

/* At the head of every method that uses the ring: 0, or -1 with an exception if it is closed, in a
 * forked child, and in another thread than the one that a single_thread ring belongs to. */
int ring_check_caller(Ring *self);

/* Frees the lock, lets go of sources that nothing needs any more, and sets the descriptors that say
 * whether completions wait. */
void ring_unlock(Ring *self);

/* The exception for an outcome other than DONE. Returns NULL. */
PyObject *ring_raise(const Ring *self, int outcome, const char *call);

/* OSError for a system call that failed, with the words of errors.py. `path` may be NULL. */
void ring_raise_errno(int number, const char *call, PyObject *path);

/* Wakes the followers that wait for `request`; NULL: those that wait for completions. */
void ring_wake_locked(Ring *self, const struct request *request);

/* Wakes all followers, to look again. */
void ring_wake_all_locked(Ring *self);

/* Wakes a follower to lead, where nobody does: at each end of a wait. */
void ring_pass_the_lead_locked(Ring *self);

/* Waits on the futex word of a follower that is in the list, without the lock, until it is woken or the
 * moment `until` has come. True: a signal has ended it. */
bool ring_follow(struct follower *follower, int64_t until);

/* Moments of CLOCK_MONOTONIC, in ns. */
int64_t ring_now(void);
struct timespec ring_time_left(int64_t deadline);

/* Wakes the event loops that wait for completions, to look again: there are more, nothing is left to
 * wait for, or the stream was closed. Each has an eventfd of its own, since the first to look would
 * clear a shared one. They see a CQE that nobody has consumed on the ring's descriptor. */
void ring_tell_watches_locked(Ring *self);

/* Watch: the two descriptors that an event loop reads, for as long as it has this. */
typedef struct {
    PyObject_HEAD
    struct watch *watch; /* a reference */
    int arrivals;        /* a descriptor of its own for what arrival_fd_locked gives */
} Watch;

/* Makes one event loop look again. */
void watch_tell(struct watch *watch);
void watch_release(struct watch *watch);

PyObject *ring_fileno(Ring *self, PyObject *ignored);
PyObject *ring_watch(Ring *self, PyObject *ignored);

#endif
