/*
 * Requests: commands that belong together, and what they go through.
 *
 *   MADE ──start──► QUEUED ──last command sent──► FLYING ──last one back──► FINISHED
 *                      │                             │                        ▲
 *    │                 └─────────give up, or an error of sending──────────────┤
 *    └──────────────────────────────────give up───────────────────────────────┘
 *
 * A request that is made is its maker's alone, and may be freed. From its start to its finish it is the
 * ring's: each of its transitions is one step under the ring's lock, and none of them can fail half
 * way. `left` is what tells: it is 0 from the finish on, and never before.
 *
 * Given up means that nobody waits for it any more. What it had not sent is not sent; what the kernel
 * has stays in flight, and may write into the memory. So a request that was given up keeps its ring, and
 * with it the memory, and is in the module's list of such (`struct given_up`): whoever reads into that
 * memory next, by whatever ring, waits until it has finished. Reads into bounce slots are in nobody's way:
 * what they bring is not copied any more.
 *
 * carry.c has the transitions.
 */
#ifndef GDSDIRECT_REQUEST_H
#define GDSDIRECT_REQUEST_H

#include "inflight.h"

/* The wanted part of an aligned read into a bounce slot. */
struct bounce {
    uint32_t skip;   /* bytes before it */
    uint32_t wanted; /* bytes */
    uint32_t slot;   /* while it is in flight */
};

#define NO_COMMAND SIZE_MAX

struct request {
    struct request *next;      /* in the list that it is in: queued, to be told, to be freed */
    struct request *next_lost; /* in the module's list of those given up */
    PyObject *ring;            /* of one that was given up: a reference */
    struct command *commands;  /* of bounced ones `address` is where the wanted bytes go */
    struct bounce *bounces;    /* NULL: straight into their place */
    Memory *lent; /* the memory as its user has it: a reference, and in use while it is started */
    Source **sources;  /* a reference for each command, or one for all */
    uint32_t *holders; /* the same, in the ring's table, once it is started */
    size_t source_count;
    size_t count; /* commands, but for those that were cut off */
    size_t sent;
    size_t left;        /* not back yet */
    size_t first_short; /* of those that were not whole: see request_short */
    enum way way;
    int error;     /* errno of the submission that failed, or a code of ring.h; 0: none did */
    bool started;  /* it is the ring's, or was */
    bool queued;   /* it is in the ring's queue */
    bool told;     /* it is in its watch's list, to have its futures set */
    bool given_up; /* nobody waits for it */
    bool owned;    /* a Request of Python's has it, and frees it */
    PyObject
        *futures; /* a list of those to be set once it has finished, for `watch`; a reference */
    struct watch *watch;
    struct command
        one; /* saves an allocation; `commands` is NULL where there are none to know of */
};

/* Room for `count` commands, and for that many sources or one; all is zeroed. NULL: no memory. */
static inline struct request *
request_new(size_t count, size_t sources, bool bounced)
{
    const size_t commands = count > 1 ? count * sizeof(struct command) : 0;
    const size_t bounces = bounced ? count * sizeof(struct bounce) : 0;
    const size_t pointers = sources * sizeof(Source *);
    const size_t holders = sources * sizeof(uint32_t);
    struct request *request = calloc(1, sizeof(*request) + commands + pointers + bounces + holders);
    if (request == NULL) {
        return NULL;
    }
    char *rest = (char *)(request + 1);
    request->commands = commands > 0 ? (struct command *)rest : &request->one;
    rest += commands;
    request->sources = (Source **)rest;
    rest += pointers;
    request->bounces = bounced ? (struct bounce *)rest : NULL;
    rest += bounces;
    request->holders = (uint32_t *)rest;
    request->source_count = sources;
    request->count = request->left = count;
    request->first_short = NO_COMMAND;
    return request;
}

/* Frees one that isn't started, or has finished. With the GIL held, and no lock. */
static inline void
request_free(struct request *request)
{
    for (size_t i = 0; i < request->source_count; i++) {
        Py_XDECREF(request->sources[i]);
    }
    Py_XDECREF(request->futures);
    Py_XDECREF(request->lent);
    free(request);
}

static inline void
request_free_all(struct request *first)
{
    while (first != NULL) {
        struct request *next = first->next;
        request_free(first);
        first = next;
    }
}

/* Of a command that was not whole: the kernel's result and the bytes that came, kept in the command
 * itself, and the next such, or NO_COMMAND. */
struct shortfall {
    size_t next;
    int32_t res;
    uint32_t nbytes;
};

/* Kept where the command was, which nothing needs any more: what comes back can't fail for want of memory.
 * A read of all 0x7FFFF000 bytes at the most leaves the sign of `res` as it is. */
static inline void
request_note_short(struct request *request, size_t index, int32_t res, uint32_t nbytes)
{
    struct command *command = &request->commands[index];
    command->position = request->first_short;
    command->address = (uint32_t)res;
    command->nbytes = nbytes;
    request->first_short = index;
}

static inline struct shortfall
request_short(const struct request *request, size_t index)
{
    const struct command *command = &request->commands[index];
    return (struct shortfall){
        .next = command->position,
        .res = (int32_t)(uint32_t)command->address,
        .nbytes = command->nbytes,
    };
}

#endif
