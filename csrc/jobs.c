/*
 * Jobs, and the threads that do them: few, made when they are needed, and gone when they were idle for a
 * moment.
 */
#include "jobs.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <structmember.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#define MAX_WORKERS 4   /* that copy at a time: more don't make memory faster */
#define MOST_WORKERS 64 /* where others may be stuck, at a file whose server doesn't answer */
#define IDLE_NS 200000000L
#define SLICE_NS 50000000L /* of a wait, after which signals are looked for */

typedef struct job {
    PyObject_HEAD
    PyObject *module;
    struct job *next; /* in the queue */
    enum job_state state;
    pid_t process;
    int event_fd;      /* readable once it is done; -1: nobody asked */
    PyObject *waiting; /* a list, for what an event loop has to tell */
    const struct job_kind *kind;
    void *data;
} Job;

/* ---- Workers ----------------------------------------------------------------------------- */

static struct timespec
moment_after(long nanoseconds)
{
    struct timespec moment;
    clock_gettime(CLOCK_REALTIME, &moment);
    moment.tv_nsec += nanoseconds;
    moment.tv_sec += moment.tv_nsec / 1000000000L;
    moment.tv_nsec %= 1000000000L;
    return moment;
}

/* Those who wait hear that it is through. */
static void
tell_locked(struct workers *workers, Job *job)
{
    if (job->event_fd >= 0) {
        const uint64_t one = 1;
        const ssize_t ignored = write(job->event_fd, &one, sizeof(one));
        (void)ignored;
    }
    pthread_cond_broadcast(&workers->done);
}

static void
run_unlocked(struct workers *workers, Job *job)
{
    job->state = JOB_RUNNING;
    pthread_mutex_unlock(&workers->lock);
    job->kind->run(job->data);
    pthread_mutex_lock(&workers->lock);
    job->state = JOB_DONE;
    tell_locked(workers, job);
}

static void
remove_locked(struct workers *workers, const Job *job)
{
    Job *before = NULL;
    Job **link = &workers->first;
    while (*link != job) {
        before = *link;
        link = &before->next;
    }
    *link = job->next;
    if (workers->last == job) {
        workers->last = before;
    }
}

static void *
serve(void *argument)
{
    struct workers *workers = argument;
    bool idled = false;
    pthread_mutex_lock(&workers->lock);
    while (!workers->ending && !(idled && workers->first == NULL)) {
        Job *job = workers->first;
        if (job != NULL) {
            remove_locked(workers, job);
            run_unlocked(workers, job);
            idled = false;
            continue;
        }
        const struct timespec end = moment_after(IDLE_NS);
        workers->idle++;
        idled = pthread_cond_timedwait(&workers->work, &workers->lock, &end) == ETIMEDOUT;
        workers->idle--;
    }
    workers->count--;
    pthread_cond_broadcast(&workers->done);
    pthread_mutex_unlock(&workers->lock);
    return NULL;
}

static unsigned
most_workers(void)
{
    cpu_set_t processors;
    const int count = sched_getaffinity(0, sizeof(processors), &processors) == 0
                          ? CPU_COUNT(&processors)
                          : MAX_WORKERS;
    return count < MAX_WORKERS ? (unsigned)count : MAX_WORKERS;
}

static void
add_worker_locked(struct workers *workers, unsigned most)
{
    pthread_attr_t detached;
    pthread_t thread;
    if (workers->idle > 0 || workers->count >= most || pthread_attr_init(&detached) != 0) {
        return;
    }
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    workers->count += pthread_create(&thread, &detached, serve, workers) == 0;
    pthread_attr_destroy(&detached);
}

static void
begin(struct workers *workers)
{
    pthread_mutex_init(&workers->lock, NULL);
    pthread_cond_init(&workers->work, NULL);
    pthread_cond_init(&workers->done, NULL);
    workers->process = getpid();
    workers->first = workers->last = NULL;
    workers->count = workers->idle = 0;
}

/* In a fork's child the threads of its parent aren't there, and one of them may have had the lock. */
static void
lock_workers(struct workers *workers)
{
    if (workers->process != getpid()) {
        begin(workers);
    }
    pthread_mutex_lock(&workers->lock);
}

void
gdsdirect_workers_init(struct workers *workers)
{
    *workers = (struct workers){.ending = false};
    begin(workers);
}

/* Waits until no thread is left: their state goes with the module. No Job is there any more. */
void
gdsdirect_workers_end(struct workers *workers)
{
    lock_workers(workers);
    workers->ending = true;
    pthread_cond_broadcast(&workers->work);
    while (workers->count > 0) {
        pthread_cond_wait(&workers->done, &workers->lock);
    }
    pthread_mutex_unlock(&workers->lock);
}

/* ---- A Job ------------------------------------------------------------------------------- */

static inline struct workers *
workers_of(const Job *job)
{
    return &((struct module_state *)PyModule_GetState(job->module))->workers;
}

PyObject *
gdsdirect_job(PyObject *module, const struct job_kind *kind, void *data)
{
    struct module_state *state = PyModule_GetState(module);
    Job *self = (Job *)state->job_type->tp_alloc(state->job_type, 0);
    if (self == NULL) {
        kind->clear(data);
        return NULL;
    }
    self->module = Py_NewRef(module);
    self->process = getpid();
    self->event_fd = -1;
    self->kind = kind;
    self->data = data;
    self->waiting = PyList_New(0);
    if (self->waiting == NULL) {
        self->state = JOB_DONE; /* nothing is to be ended */
        Py_DECREF(self);
        return NULL;
    }
    struct workers *workers = &state->workers;
    lock_workers(workers);
    if (workers->first == NULL) {
        workers->first = self;
    }
    else {
        workers->last->next = self;
    }
    workers->last = self;
    add_worker_locked(workers, most_workers());
    pthread_cond_signal(&workers->work);
    pthread_mutex_unlock(&workers->lock);
    return (PyObject *)self;
}

static inline bool
is_through(const Job *self)
{
    return self->state == JOB_DONE || self->state == JOB_DROPPED;
}

/*
 * Until it is through, or for a moment. Without the GIL. Who waits does not do the job itself, for signals
 * would wait as long as it takes; but where no thread can be made nobody else does it.
 */
static bool
wait_a_moment(Job *self)
{
    struct workers *workers = workers_of(self);
    pthread_mutex_lock(&workers->lock);
    if (self->state == JOB_QUEUED && workers->count == 0) {
        remove_locked(workers, self);
        run_unlocked(workers, self);
    }
    else if (!is_through(self)) {
        const struct timespec end = moment_after(SLICE_NS);
        pthread_cond_timedwait(&workers->done, &workers->lock, &end);
        if (self->state == JOB_QUEUED) {
            add_worker_locked(workers, MOST_WORKERS);
        }
    }
    const bool done = is_through(self);
    pthread_mutex_unlock(&workers->lock);
    return done;
}

static int
check_process(const Job *self)
{
    if (self->process == getpid()) {
        return 0;
    }
    PyErr_SetString(PyExc_RuntimeError, STREAM_OF_ANOTHER_PROCESS);
    return -1;
}

static int
wait_until_through(Job *self)
{
    bool done = false;
    while (!done) {
        if (check_process(self) < 0) {
            return -1;
        }
        Py_BEGIN_ALLOW_THREADS
        done = wait_a_moment(self);
        Py_END_ALLOW_THREADS
        if (PyErr_CheckSignals() < 0) {
            return -1;
        }
    }
    return 0;
}

/* result(): what came of it, once it is done; waits for that. */
static PyObject *
job_result(Job *self, PyObject *Py_UNUSED(ignored))
{
    if (wait_until_through(self) < 0) {
        return NULL;
    }
    if (self->state == JOB_DROPPED) {
        PyErr_SetString(PyExc_ValueError, "the stream is closed");
        return NULL;
    }
    return self->kind->result(self->data);
}

static void
drop_locked(struct workers *workers, Job *self)
{
    if (self->state == JOB_QUEUED) {
        remove_locked(workers, self);
        self->state = JOB_DROPPED;
        tell_locked(workers, self);
    }
}

/* drop(): takes it out of the queue if it has not begun, so that there is nothing to wait for. */
static PyObject *
job_drop(Job *self, PyObject *Py_UNUSED(ignored))
{
    if (check_process(self) < 0) {
        return NULL;
    }
    struct workers *workers = workers_of(self);
    pthread_mutex_lock(&workers->lock);
    drop_locked(workers, self);
    pthread_mutex_unlock(&workers->lock);
    Py_RETURN_NONE;
}

/* end(): drop(), and waits until it has run where it has begun: then it writes nothing any more. */
static PyObject *
job_end(Job *self, PyObject *ignored)
{
    PyObject *dropped = job_drop(self, ignored);
    if (dropped == NULL || wait_until_through(self) < 0) {
        Py_XDECREF(dropped);
        return NULL;
    }
    return dropped;
}

static bool
is_done(Job *self)
{
    struct workers *workers = workers_of(self);
    pthread_mutex_lock(&workers->lock);
    const bool done = is_through(self);
    pthread_mutex_unlock(&workers->lock);
    return done;
}

static PyObject *
job_get_done(Job *self, void *Py_UNUSED(closure))
{
    return check_process(self) < 0 ? NULL : PyBool_FromLong(is_done(self));
}

/* fileno(): a descriptor that is readable once it is done, for an event loop. */
static PyObject *
job_fileno(Job *self, PyObject *Py_UNUSED(ignored))
{
    if (check_process(self) < 0) {
        return NULL;
    }
    struct workers *workers = workers_of(self);
    pthread_mutex_lock(&workers->lock);
    if (self->event_fd < 0) {
        self->event_fd = eventfd(is_through(self), EFD_CLOEXEC | EFD_NONBLOCK);
    }
    const int fd = self->event_fd;
    const int failed = errno;
    pthread_mutex_unlock(&workers->lock);
    if (fd < 0) {
        errno = failed;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return PyLong_FromLong(fd);
}

/* Drops it, or waits until it has run, whatever signal comes. Without the GIL. */
static void
end_job(Job *self)
{
    struct workers *workers = workers_of(self);
    pthread_mutex_lock(&workers->lock);
    drop_locked(workers, self);
    while (self->state == JOB_RUNNING) {
        pthread_cond_wait(&workers->done, &workers->lock);
    }
    pthread_mutex_unlock(&workers->lock);
}

static int
job_traverse(Job *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->waiting);
    Py_VISIT(self->module);
    return 0;
}

static int
job_clear(Job *self)
{
    Py_CLEAR(self->waiting);
    return 0;
}

static void
job_dealloc(Job *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    if (self->process == getpid()) {
        Py_BEGIN_ALLOW_THREADS
        end_job(self);
        Py_END_ALLOW_THREADS
    }
    if (self->event_fd >= 0) {
        close(self->event_fd);
    }
    self->kind->clear(self->data);
    Py_XDECREF(self->waiting);
    Py_DECREF(self->module);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMemberDef job_members[] = {
    {"waiting", T_OBJECT_EX, offsetof(Job, waiting), READONLY, "Futures, for an event loop."},
    {0},
};

static PyGetSetDef job_getset[] = {
    {"done", (getter)job_get_done, NULL, "Whether it has run, or was dropped.", NULL},
    {0},
};

static PyMethodDef job_methods[] = {
    {"result", (PyCFunction)job_result, METH_NOARGS, "What came of it; waits until it has run."},
    {"drop", (PyCFunction)job_drop, METH_NOARGS, "Takes it out of the queue, if it has not begun."},
    {"end", (PyCFunction)job_end, METH_NOARGS, "Drops it, or waits until it has run."},
    {"fileno", (PyCFunction)job_fileno, METH_NOARGS, "A descriptor, readable once it has run."},
    {0},
};

static PyType_Slot job_slots[] = {
    {Py_tp_dealloc, job_dealloc},
    {Py_tp_traverse, job_traverse},
    {Py_tp_clear, job_clear},
    {Py_tp_members, job_members},
    {Py_tp_methods, job_methods},
    {Py_tp_getset, job_getset},
    {0, NULL},
};

PyType_Spec gdsdirect_job_spec = {
    .name = "gdsdirect._uring_cmd.Job",
    .basicsize = sizeof(Job),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE |
             Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = job_slots,
};
