/*
 * Requests carried out: started, sent as room allows, taken in, given up. request.h has the states.
 *
 * Nothing here runs Python code, and what the GIL is needed for says so.
 */
#ifndef GDSDIRECT_CARRY_H
#define GDSDIRECT_CARRY_H

#include "ring.h"

/* Queues a request; request_pump_locked sends it. The code of a failure: then it is as it was. With the
 * GIL held. */
int request_start_locked(Ring *self, struct request *request);

/* Nobody waits for it any more. With the GIL held. */
void request_give_up_locked(Ring *self, struct request *request);

/* Has the event loop that waits for it look at it. */
void request_tell_locked(struct request *request);

/* Makes one request of the commands in flight, and gives it up: the ring's user leaves the ring. With the
 * GIL held. */
void request_adopt_locked(Ring *self);

/* The request that a command was of takes in what became of it. Its slot is free afterwards. */
void request_land_locked(Ring *self, struct slot *slot, int32_t res);

/* Sends what there is room for, some commands of each queued request in turn. */
void request_pump_locked(Ring *self);

/* Gives the ring memory for bounce slots, unless it has some. Takes both references, or gives them back
 * by the same pointers. */
void request_lend_bounce_locked(Ring *self, Memory **memory, Py_buffer *export);

/* A ring, as a new reference, that has a request which was given up and may write to these addresses; or
 * NULL. With the GIL held. */
Ring *request_in_the_way(struct module_state *module, uint64_t low, uint64_t high);

/* The same for all of a ring's memory. */
Ring *request_in_the_way_of(Ring *self);

/* Whether this ring has one. */
bool request_is_in_the_way_locked(const Ring *self, uint64_t low, uint64_t high);

/* The rings that have requests which were given up, as new references, `most` of them. With the GIL. */
size_t request_rings_of_given_up(struct module_state *module, Ring **rings, size_t most);

#endif
