/*
 * Requests carried out: started, sent as room allows, taken in, given up. request.h has the states.
 *
 * Nothing here runs Python code. A function that needs the GIL says so.
 */
#ifndef GDSDIRECT_CARRY_H
#define GDSDIRECT_CARRY_H

#include "ring.h"

/* Queues a request, which request_pump_locked then sends. After a code other than DONE the request is as it
 * was. The caller holds the GIL. */
int request_start_locked(Ring *self, struct request *request);

/* Gives the request up: nobody waits for it any more. The caller holds the GIL. */
void request_give_up_locked(Ring *self, struct request *request);

/* Makes the event loop that waits for the request look at it. */
void request_tell_locked(struct request *request);

/* The user of the ring has left it. Makes one request of the commands in flight, and gives that up. The caller
 * holds the GIL. */
void request_adopt_locked(Ring *self);

/* A command came back with `res`: its request takes the result in, and its slot is free afterwards. */
void request_land_locked(Ring *self, struct slot *slot, int32_t res);

/* Sends as many commands as there is room for, some of each queued request in turn. */
void request_pump_locked(Ring *self);

/* Gives the ring memory for bounce slots. If the ring has some already, the caller keeps both references;
 * else it finds them taken. */
void request_lend_bounce_locked(Ring *self, Memory **memory, Py_buffer *export);

/* Finds a ring with a request that was given up and may write into the memory of this one. Returns a new
 * reference, or NULL. The caller holds the GIL. */
Ring *request_in_the_way(const Ring *self);

/* Says whether the ring `of` has such a request. The caller holds the lock of `of`. */
bool request_is_in_the_way_locked(const Ring *self, const Ring *of);

/* Finds rings that have requests which were given up, and fills `rings` with at most `most` new references.
 * Returns their number. The caller holds the GIL. */
size_t request_rings_of_given_up(struct module_state *module, Ring **rings, size_t most);

#endif
