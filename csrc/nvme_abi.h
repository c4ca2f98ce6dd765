/*
 * Layouts: the package's 64-byte read command, the kernel's NVMe structs, and the way from the one
 * to the other. No Python and no kernel header, so that it compiles on any system.
 *
 * Sources: Linux include/uapi/linux/nvme_ioctl.h (struct nvme_uring_cmd, struct nvme_passthru_cmd,
 * the ioctl numbers); NVM Command Set Specification 1.0, "Read command" (command dwords 10 to 12).
 */
#ifndef GDSDIRECT_NVME_ABI_H
#define GDSDIRECT_NVME_ABI_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define NVME_CMD_READ 0x02
#define NVME_ADMIN_IDENTIFY 0x06
#define NVME_MAX_BLOCKS 65536u /* NLB is 16 bits wide and 0 means one block */

/* _IOWR('N', 0x41, struct nvme_passthru_cmd) and _IOWR('N', 0x80, struct nvme_uring_cmd) */
#define NVME_IOCTL_ADMIN_CMD 0xC0484E41u
#define NVME_URING_CMD_IO 0xC0484E80u

/*
 * The wire format, 64 bytes, little-endian. It is this package's own and not the kernel's struct:
 * sent to the kernel as it is, `dest` would be read as metadata_len and data_len (6.1 crashes).
 *
 *   0 opcode u8 | 4 nsid u32 | 32 destination u64 | 40 starting LBA u64 | 48 blocks - 1 u32 | rest 0
 */
#define WIRE_BYTES 64

/* A read command, decoded. */
struct nvme_read {
    uint64_t lba;
    uint64_t address;
    uint32_t nsid;
    uint32_t blocks;
};

/* struct nvme_uring_cmd, and struct nvme_passthru_cmd, whose last word is the result instead. */
struct nvme_kernel_cmd {
    uint8_t opcode;
    uint8_t flags;
    uint16_t rsvd1;
    uint32_t nsid;
    uint32_t cdw2;
    uint32_t cdw3;
    uint64_t metadata;
    uint64_t addr;
    uint32_t metadata_len;
    uint32_t data_len;
    uint32_t cdw10;
    uint32_t cdw11;
    uint32_t cdw12;
    uint32_t cdw13;
    uint32_t cdw14;
    uint32_t cdw15;
    uint32_t timeout_ms;
    uint32_t rsvd2_or_result;
};

_Static_assert(sizeof(struct nvme_kernel_cmd) == 72, "struct nvme_uring_cmd is 72 bytes");
_Static_assert(offsetof(struct nvme_kernel_cmd, nsid) == 4, "nsid");
_Static_assert(offsetof(struct nvme_kernel_cmd, metadata) == 16, "metadata");
_Static_assert(offsetof(struct nvme_kernel_cmd, addr) == 24, "addr");
_Static_assert(offsetof(struct nvme_kernel_cmd, metadata_len) == 32, "metadata_len");
_Static_assert(offsetof(struct nvme_kernel_cmd, data_len) == 36, "data_len");
_Static_assert(offsetof(struct nvme_kernel_cmd, cdw10) == 40, "cdw10");
_Static_assert(offsetof(struct nvme_kernel_cmd, cdw12) == 48, "cdw12");
_Static_assert(offsetof(struct nvme_kernel_cmd, timeout_ms) == 64, "timeout_ms");

/* Between a number and its little-endian bytes, held as a word. Its own inverse. */
static inline uint64_t
little_endian(uint64_t value)
{
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    return __builtin_bswap64(value);
#else
    return value;
#endif
}

/* Stored word by word where it goes: gathered in a local array first, it would be copied from there
 * by loads wider than the stores before them, which stall. */
static inline void
wire_encode(unsigned char *out, const struct nvme_read *read)
{
    const uint64_t head = little_endian(NVME_CMD_READ | (uint64_t)read->nsid << 32);
    const uint64_t address = little_endian(read->address);
    const uint64_t lba = little_endian(read->lba);
    const uint64_t tail = little_endian(read->blocks - 1);
    memset(out, 0, WIRE_BYTES);
    memcpy(out, &head, 8);
    memcpy(out + 32, &address, 8);
    memcpy(out + 40, &lba, 8);
    memcpy(out + 48, &tail, 8);
}

/* A word of the caller's memory, at any address. Volatile: fetched once, so that memory that changes
 * meanwhile can't pass the check as one command and leave as another. */
struct wire_word {
    uint64_t value;
}
#if defined(__GNUC__)
__attribute__((packed, may_alias))
#endif
;

static inline uint64_t
wire_fetch(const unsigned char *wire, int index)
{
    return little_endian(((const volatile struct wire_word *)wire)[index].value);
}

/* What is wrong with 64 bytes; NULL: nothing, and `read` is filled. */
static inline const char *
wire_decode(const unsigned char *wire, struct nvme_read *read)
{
    const uint64_t head = wire_fetch(wire, 0);
    const uint64_t tail = wire_fetch(wire, 6);
    const uint64_t reserved = (head & 0xFFFFFF00u) | wire_fetch(wire, 1) | wire_fetch(wire, 2) |
                              wire_fetch(wire, 3) | wire_fetch(wire, 7) | tail >> 32;
    if ((head & 0xFF) != NVME_CMD_READ) {
        return "opcode (byte 0) is not NVME_CMD_READ, 0x02";
    }
    if (reserved != 0) {
        return "reserved bytes (1..3, 8..31 and 52..63) are not all 0";
    }
    if (tail >= NVME_MAX_BLOCKS) {
        return "blocks - 1 (bytes 48..51) is above 65535";
    }
    read->nsid = (uint32_t)(head >> 32);
    read->address = wire_fetch(wire, 4);
    read->lba = wire_fetch(wire, 5);
    read->blocks = (uint32_t)tail + 1;
    return NULL;
}

/* The kernel's form of a read. metadata_len stays 0: there is never a metadata buffer. */
static inline void
kernel_cmd_fill(struct nvme_kernel_cmd *cmd, const struct nvme_read *read, uint32_t data_len)
{
    *cmd = (struct nvme_kernel_cmd){
        .opcode = NVME_CMD_READ,
        .nsid = read->nsid,
        .addr = read->address,
        .data_len = data_len,
        .cdw10 = (uint32_t)read->lba,
        .cdw11 = (uint32_t)(read->lba >> 32),
        .cdw12 = read->blocks - 1,
    };
}

#endif
