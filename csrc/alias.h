/*
 * Aliases: the addresses below 4 GiB that Linux may take for those of a buffer, kept free of anything.
 *
 * A passthrough command into unregistered memory that a worker thread of the kernel's sends (io-wq:
 * the drive's queue was full or frozen) can have its address cut to 32 bits: a worker that was made on
 * return from an interrupt is taken for a process of the x32 ABI (in_x32_syscall looks at orig_ax,
 * which is negative then; nvme_to_user_ptr in drivers/nvme/host/ioctl.c). Where nothing is mapped at
 * the alias, the command fails with EFAULT and is sent again. Where something is, such as the heap of
 * an executable that is not position-independent, the drive would overwrite it, and the command would
 * succeed. So aliases are mapped without access as long as there is a buffer to them.
 *
 * Only x86-64 has the x32 ABI. Elsewhere, all of this is nothing.
 */
#ifndef GDSDIRECT_ALIAS_H
#define GDSDIRECT_ALIAS_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define ALIAS_SHIFT 16 /* granules of 64 KiB, vm.mmap_min_addr's usual value: below, nothing maps */
#define ALIAS_GRANULES (1u << (32 - ALIAS_SHIFT))

struct aliases {
    pthread_mutex_t lock;
    uint32_t *users; /* of each granule, times two; the lowest bit: it is held free */
};

/* False: no memory. */
bool alias_init(struct aliases *aliases);
void alias_free(struct aliases *aliases);

/* Holds the aliases of a range free. False: some can't be, because they are in use; alias_is_held
 * tells of which. */
bool alias_hold(struct aliases *aliases, uintptr_t address, size_t nbytes);

/* Undoes alias_hold of the same range, whatever it returned. */
void alias_release(struct aliases *aliases, uintptr_t address, size_t nbytes);

/* Whether a part of a range that alias_hold was called for has nothing at its aliases. */
bool alias_is_held(struct aliases *aliases, uintptr_t address, size_t nbytes);

#endif
