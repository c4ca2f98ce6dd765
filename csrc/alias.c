/* Aliases: see alias.h. */
#include "chaos.h"

#include "alias.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

bool
alias_init(struct aliases *aliases)
{
    aliases->users = calloc(ALIAS_GRANULES, sizeof(*aliases->users));
    return aliases->users != NULL && pthread_mutex_init(&aliases->lock, NULL) == 0;
}

void
alias_free(struct aliases *aliases)
{
    if (aliases->users != NULL) {
        pthread_mutex_destroy(&aliases->lock);
        free(aliases->users);
        aliases->users = NULL;
    }
}

#define HELD 1u
#define ONE_USER 2u
#define BELOW_4_GIB (UINT64_C(1) << 32)

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif

/* Only on x86-64, and below 4 GiB an address is its own alias. */
static bool
has_alias(uintptr_t address, size_t nbytes)
{
#if defined(__x86_64__)
    return nbytes > 0 && address + nbytes > BELOW_4_GIB;
#else
    (void)address, (void)nbytes;
    return false;
#endif
}

static uint64_t
granules_of(uintptr_t address, size_t nbytes)
{
    return ((address + nbytes - 1) >> ALIAS_SHIFT) - (address >> ALIAS_SHIFT) + 1;
}

static uint32_t
granule_at(uintptr_t address, uint64_t index)
{
    return (uint32_t)(((address >> ALIAS_SHIFT) + index) % ALIAS_GRANULES);
}

static bool
map_nothing(uint32_t first, uint32_t count)
{
    void *wanted = (void *)((uintptr_t)first << ALIAS_SHIFT);
    const size_t nbytes = (size_t)count << ALIAS_SHIFT;
    void *found = mmap(wanted, nbytes, PROT_NONE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
    if (found == wanted) {
        return true;
    }
    if (found != MAP_FAILED) {
        munmap(found, nbytes); /* before Linux 4.17 the flag is not known, and the address a hint */
    }
    /* Where this process may map nothing, nothing of it is. */
    return first == 0 && count == 1 && (errno == EPERM || errno == EACCES);
}

/* Holds what can be held of a run of granules, none of which is: all at once, else by halves. */
static void
hold_run(struct aliases *aliases, uint32_t first, uint32_t count)
{
    if (map_nothing(first, count)) {
        for (uint32_t i = 0; i < count; i++) {
            aliases->users[first + i] |= HELD;
        }
    }
    else if (count > 1) {
        hold_run(aliases, first, count / 2);
        hold_run(aliases, first + count / 2, count - count / 2);
    }
}

static bool
is_not_held(uint32_t users)
{
    return !(users & HELD);
}

static bool
is_held_for_nobody(uint32_t users)
{
    return users == HELD;
}

/* Calls `act` for each run of granules of a range that all match. */
static void
for_runs(struct aliases *aliases, uintptr_t address, uint64_t count, bool (*matches)(uint32_t),
         void (*act)(struct aliases *, uint32_t, uint32_t))
{
    for (uint64_t i = 0; i < count && i < ALIAS_GRANULES;) {
        const uint32_t first = granule_at(address, i);
        uint32_t run = 0;
        while (i + run < count && first + run < ALIAS_GRANULES &&
               matches(aliases->users[first + run])) {
            run++;
        }
        if (run > 0) {
            act(aliases, first, run);
        }
        i += run > 0 ? run : 1;
    }
}

static void
let_go_of_run(struct aliases *aliases, uint32_t first, uint32_t count)
{
    munmap((void *)((uintptr_t)first << ALIAS_SHIFT), (size_t)count << ALIAS_SHIFT);
    for (uint32_t i = 0; i < count; i++) {
        aliases->users[first + i] = 0;
    }
}

bool
alias_hold(struct aliases *aliases, uintptr_t address, size_t nbytes)
{
    if (!has_alias(address, nbytes)) {
        return true;
    }
    const uint64_t count = granules_of(address, nbytes);
    bool all = true;
    pthread_mutex_lock(&aliases->lock);
    for_runs(aliases, address, count, is_not_held, hold_run);
    for (uint64_t i = 0; i < count; i++) {
        aliases->users[granule_at(address, i)] += ONE_USER;
        all = all && aliases->users[granule_at(address, i)] & HELD;
    }
    pthread_mutex_unlock(&aliases->lock);
    return all;
}

void
alias_release(struct aliases *aliases, uintptr_t address, size_t nbytes)
{
    if (!has_alias(address, nbytes)) {
        return;
    }
    const uint64_t count = granules_of(address, nbytes);
    pthread_mutex_lock(&aliases->lock);
    for (uint64_t i = 0; i < count; i++) {
        aliases->users[granule_at(address, i)] -= ONE_USER;
    }
    for_runs(aliases, address, count, is_held_for_nobody, let_go_of_run);
    pthread_mutex_unlock(&aliases->lock);
}

bool
alias_is_held(struct aliases *aliases, uintptr_t address, size_t nbytes)
{
    if (!has_alias(address, nbytes)) {
        return true;
    }
    const uint64_t count = granules_of(address, nbytes);
    bool all = true;
    pthread_mutex_lock(&aliases->lock);
    for (uint64_t i = 0; all && i < count; i++) {
        all = aliases->users[granule_at(address, i)] & HELD;
    }
    pthread_mutex_unlock(&aliases->lock);
    return all;
}
