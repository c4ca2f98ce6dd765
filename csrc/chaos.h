/*
 * Chaos: with -DGDSDIRECT_CHAOS threads step aside at random where their order could matter, so that races
 * show in seconds instead of years. Without it, nothing of this is compiled.
 *
 * Every mutex that is taken or freed and every release of the GIL is such a place without further doing, in
 * each file that includes this one, since their names are redefined below. The rest is marked by hand:
 *
 *   CHAOS_POINT()    stands between a look and what is done about it, and between the steps of a transition
 *   CHAOS_CHANCE()   is true now and then, and always false without the define. It forces a branch that is
 *                    otherwise taken only when another thread or the kernel acts at the right moment
 *
 * A point changes neither errno nor what may happen, only how often. With the GIL held it lets in only threads
 * that have let go of it, so a point is worth most right behind a release, and all of them are under a
 * free-threaded CPython.
 *
 * GDSDIRECT_CHAOS_SEED, a number, is what the draws of all threads begin with.
 */
#ifndef GDSDIRECT_CHAOS_H
#define GDSDIRECT_CHAOS_H

#ifndef GDSDIRECT_CHAOS

#define CHAOS_POINT() ((void)0)
#define CHAOS_CHANCE() 0

#else

#include "pycompat.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

#define CHAOS_POINT() chaos_point()
#define CHAOS_CHANCE() (chaos_next() % 8 == 0)

/* Static in each file that includes this, against the rule, and only in this build: a thread has a series of
 * draws for each, which is as good as one. */
static _Atomic uint64_t chaos_threads;
static _Thread_local uint64_t chaos_state; /* 0: this thread has drawn nothing so far */
static _Thread_local uint64_t chaos_calm;  /* points of which one is slept at */

/* The next of the thread's draws (xorshift64). */
static inline uint64_t
chaos_next(void)
{
    uint64_t state = chaos_state;
    if (state == 0) {
        const char *seed = getenv("GDSDIRECT_CHAOS_SEED");
        state = seed != NULL ? strtoull(seed, NULL, 10) << 16 : 0;
        state = ((state + atomic_fetch_add(&chaos_threads, 1)) * UINT64_C(0x9E3779B97F4A7C15)) | 1;
        chaos_calm = UINT64_C(32) << (state >> 60 & 7);
    }
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    chaos_state = state;
    return state >> 16;
}

/* Of so many points as suits the thread's temper, 32 to 4096, it sleeps for 1 to 200 us at one, and yields
 * at four. Some threads so are far slower than others. */
static inline void
chaos_point(void)
{
    const int error = errno;
    const uint64_t drawn = chaos_next();
    const uint64_t place = drawn % chaos_calm;
    if (place == 0) {
        const long nanoseconds = (long)(1 + (drawn >> 16) % 200) * 1000;
        nanosleep(&(struct timespec){.tv_nsec = nanoseconds}, NULL);
    }
    else if (place <= 4) {
        sched_yield();
    }
    errno = error;
}

static inline int
chaos_mutex_lock(pthread_mutex_t *mutex)
{
    chaos_point();
    const int result = pthread_mutex_lock(mutex);
    chaos_point();
    return result;
}

/* Now and then it is as if another thread had the mutex for a moment. */
static inline int
chaos_mutex_trylock(pthread_mutex_t *mutex)
{
    chaos_point();
    return CHAOS_CHANCE() ? EBUSY : pthread_mutex_trylock(mutex);
}

static inline int
chaos_mutex_unlock(pthread_mutex_t *mutex)
{
    chaos_point();
    const int result = pthread_mutex_unlock(mutex);
    chaos_point();
    return result;
}

#define pthread_mutex_lock(mutex) chaos_mutex_lock(mutex)
#define pthread_mutex_trylock(mutex) chaos_mutex_trylock(mutex)
#define pthread_mutex_unlock(mutex) chaos_mutex_unlock(mutex)

#undef Py_BEGIN_ALLOW_THREADS
#undef Py_END_ALLOW_THREADS
#define Py_BEGIN_ALLOW_THREADS \
    { \
        chaos_point(); \
        PyThreadState *_save = PyEval_SaveThread(); \
        chaos_point();
#define Py_END_ALLOW_THREADS \
    chaos_point(); \
    PyEval_RestoreThread(_save); \
    chaos_point(); \
    }

#endif

#endif
