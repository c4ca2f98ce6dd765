/*
 * A stand-in for libcuda.so.1, which can't exist without a GPU: device memory is the heap's, and every
 * copy is done at once. It is there for one thing, that NVIDIA's cuda-bindings, the real package, takes
 * the arguments that gdsdirect gives and hands back what gdsdirect expects. What happens in which order
 * is fake_cuda.py's, and what a GPU does tests/gpu's.
 *
 * At the end of the process it writes to $FAKE_LIBCUDA_REPORT how much is still registered.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_REGISTERED = 713,
};
enum { HOST = 1, DEVICE = 2 }; /* CUmemorytype */
enum { ATTRIBUTE_MEMORY_TYPE = 2, ATTRIBUTE_DEVICE_ORDINAL = 9 };
#define MOST 4096

typedef uintptr_t handle;

static struct range {
    uintptr_t address;
    size_t nbytes;
    int kind;
} ranges[MOST];
static int used;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static _Thread_local handle contexts[16];
static _Thread_local int depth;

static int
find(uintptr_t address, size_t nbytes)
{
    for (int i = 0; i < used; i++) {
        const uintptr_t start = ranges[i].address;
        if (start <= address && address + nbytes <= start + ranges[i].nbytes) {
            return i;
        }
    }
    return -1;
}

static int
kind_of(uintptr_t address, size_t nbytes)
{
    pthread_mutex_lock(&lock);
    const int found = find(address, nbytes), kind = found < 0 ? 0 : ranges[found].kind;
    pthread_mutex_unlock(&lock);
    return kind;
}

static int
add(uintptr_t address, size_t nbytes, int kind)
{
    pthread_mutex_lock(&lock);
    const bool room = used < MOST;
    if (room) {
        ranges[used++] = (struct range){address, nbytes, kind};
    }
    pthread_mutex_unlock(&lock);
    return room ? SUCCESS : INVALID_VALUE;
}

static int
drop(uintptr_t address, int kind, int error)
{
    pthread_mutex_lock(&lock);
    const int found = find(address, 1);
    const bool there = found >= 0 && ranges[found].kind == kind && ranges[found].address == address;
    if (there) {
        ranges[found] = ranges[--used];
    }
    pthread_mutex_unlock(&lock);
    return there ? SUCCESS : error;
}

/* ---- Devices and contexts ------------------------------------------------------------------ */

int cuInit(unsigned flags) { return flags ? INVALID_VALUE : SUCCESS; }
int cuDriverGetVersion(int *version) { return *version = 13000, SUCCESS; }
int cuDeviceGetCount(int *count) { return *count = 1, SUCCESS; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, SUCCESS; }
int cuDevicePrimaryCtxRetain(handle *context, int device) { return *context = 0xC0, device; }

int
cuDeviceGetPCIBusId(char *text, int size, int device)
{
    snprintf(text, (size_t)size, "0000:3B:00.%d", device);
    return SUCCESS;
}

int
cuCtxPushCurrent(handle context)
{
    contexts[depth++] = context;
    return context == 0xC0 ? SUCCESS : INVALID_CONTEXT;
}

int
cuCtxPopCurrent(handle *context)
{
    if (depth == 0) {
        return INVALID_CONTEXT;
    }
    *context = contexts[--depth];
    return SUCCESS;
}

int cuCtxGetCurrent(handle *context) { return *context = depth ? contexts[depth - 1] : 0, SUCCESS; }

/* ---- Memory -------------------------------------------------------------------------------- */

int
cuMemAlloc(unsigned long long *address, size_t nbytes)
{
    *address = (uintptr_t)malloc(nbytes);
    return depth ? add((uintptr_t)*address, nbytes, DEVICE) : INVALID_CONTEXT;
}

int
cuMemFree(unsigned long long address)
{
    const int result = drop((uintptr_t)address, DEVICE, INVALID_VALUE);
    if (result == SUCCESS) {
        free((void *)(uintptr_t)address);
    }
    return result;
}

int
cuMemsetD8(unsigned long long address, unsigned char value, size_t nbytes)
{
    if (kind_of((uintptr_t)address, nbytes) != DEVICE) {
        return INVALID_VALUE;
    }
    memset((void *)(uintptr_t)address, value, nbytes);
    return SUCCESS;
}

int
cuMemcpyDtoH(void *target, unsigned long long source, size_t nbytes)
{
    if (kind_of((uintptr_t)source, nbytes) != DEVICE) {
        return INVALID_VALUE;
    }
    memcpy(target, (void *)(uintptr_t)source, nbytes);
    return SUCCESS;
}

int
cuMemHostRegister(void *address, size_t nbytes, unsigned flags)
{
    if (depth == 0) {
        return INVALID_CONTEXT;
    }
    return flags == 3 ? add((uintptr_t)address, nbytes, HOST) : INVALID_VALUE;
}

int
cuMemHostUnregister(void *address)
{
    return depth ? drop((uintptr_t)address, HOST, NOT_REGISTERED) : INVALID_CONTEXT;
}

int
cuMemHostGetDevicePointer(unsigned long long *device_address, void *address, unsigned flags)
{
    *device_address = (uintptr_t)address;
    return flags == 0 && kind_of((uintptr_t)address, 1) == HOST ? SUCCESS : INVALID_VALUE;
}

int
cuPointerGetAttribute(void *data, int attribute, unsigned long long address)
{
    const int kind = kind_of((uintptr_t)address, 1);
    const bool known = attribute == ATTRIBUTE_MEMORY_TYPE || attribute == ATTRIBUTE_DEVICE_ORDINAL;
    *(int *)data = attribute == ATTRIBUTE_MEMORY_TYPE ? kind : 0;
    return kind != 0 && known ? SUCCESS : INVALID_VALUE;
}

/* ---- Streams, events, copies --------------------------------------------------------------- */

static int
made(handle *object, bool good)
{
    *object = (handle)malloc(1);
    return depth == 0 ? INVALID_CONTEXT : good ? SUCCESS : INVALID_VALUE;
}

static int
gone(handle object)
{
    free((void *)object);
    return depth ? SUCCESS : INVALID_CONTEXT;
}

int cuStreamCreate(handle *stream, unsigned flags) { return made(stream, flags == 1); }
int cuStreamDestroy(handle stream) { return gone(stream); }
int cuStreamSynchronize(handle stream) { return stream ? SUCCESS : INVALID_HANDLE; }
int cuEventCreate(handle *event, unsigned flags) { return made(event, flags == 3); }
int cuEventDestroy(handle event) { return gone(event); }
int cuEventRecord(handle event, handle stream) { return event && stream ? SUCCESS : INVALID_HANDLE; }
int cuEventQuery(handle event) { return event ? SUCCESS : INVALID_HANDLE; }
int cuEventSynchronize(handle event) { return event ? SUCCESS : INVALID_HANDLE; }

int
cuStreamWaitEvent(handle stream, handle event, unsigned flags)
{
    return stream && event && flags == 0 ? SUCCESS : INVALID_HANDLE;
}

int
cuMemcpyHtoDAsync(unsigned long long target, const void *source, size_t nbytes, handle stream)
{
    const bool known = kind_of((uintptr_t)source, nbytes) == HOST &&
                       kind_of((uintptr_t)target, nbytes) == DEVICE;
    if (stream == 0 || nbytes == 0 || !known) {
        return INVALID_VALUE;
    }
    memcpy((void *)(uintptr_t)target, source, nbytes);
    return SUCCESS;
}

/* ---- What the binding asks ----------------------------------------------------------------- */

int
cuGetErrorName(int result, const char **name)
{
    *name = result == INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE" : "CUDA_ERROR_OTHER";
    return SUCCESS;
}

int
cuGetErrorString(int result, const char **text)
{
    *text = result == INVALID_VALUE ? "invalid argument" : "another error";
    return SUCCESS;
}

int
cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status)
{
    (void)version;
    (void)flags;
    Dl_info here;
    void *self = dladdr((void *)&ranges, &here) ? dlopen(here.dli_fname, RTLD_LAZY) : NULL;
    const char *symbol = strcmp(name, "cuGetProcAddress") ? name : "cuGetProcAddress_v2";
    *function = self ? dlsym(self, symbol) : NULL;
    if (status != NULL) {
        *status = *function == NULL; /* CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND */
    }
    return *function ? SUCCESS : NOT_FOUND;
}

__attribute__((destructor)) static void
report(void)
{
    const char *path = getenv("FAKE_LIBCUDA_REPORT");
    FILE *file = path ? fopen(path, "a") : NULL;
    if (file != NULL) {
        int left = 0;
        for (int i = 0; i < used; i++) {
            left += ranges[i].kind == HOST;
        }
        fprintf(file, "%d\n", left);
        fclose(file);
    }
}
