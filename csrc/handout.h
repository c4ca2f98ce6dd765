/* What is handed out leaves in one step: see handout.c. */
#ifndef GDSDIRECT_HANDOUT_H
#define GDSDIRECT_HANDOUT_H

#include "module.h"

extern PyType_Spec gdsdirect_turn_spec, gdsdirect_then_spec, gdsdirect_slots_spec,
    gdsdirect_slot_spec, gdsdirect_handout_spec;

#endif
