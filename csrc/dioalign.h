/* What statx(2) tells of O_DIRECT since Linux 6.1, also where the C library's headers are older: wheels are
 * built with those of glibc 2.28. */
#ifndef GDSDIRECT_DIOALIGN_H
#define GDSDIRECT_DIOALIGN_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/stat.h>

/* stx_dio_mem_align and stx_dio_offset_align of struct statx (include/uapi/linux/stat.h), in bytes. */
struct dioalign {
    uint32_t memory;
    uint32_t offset;
};

#define DIOALIGN_PLACE 152 /* in struct statx; in older headers it is spare */

_Static_assert(sizeof(struct statx) == 256, "struct statx");
#ifdef STATX_DIOALIGN
_Static_assert(offsetof(struct statx, stx_dio_mem_align) == DIOALIGN_PLACE, "dio_mem_align");
_Static_assert(offsetof(struct statx, stx_dio_offset_align) == DIOALIGN_PLACE + 4,
               "dio_offset_align");
#else
#define STATX_DIOALIGN 0x2000u
#endif

/* Where stx_mask has STATX_DIOALIGN. */
static inline struct dioalign
dioalign_of(const struct statx *info)
{
    struct dioalign found;
    memcpy(&found, (const char *)info + DIOALIGN_PLACE, sizeof(found));
    return found;
}

#endif
