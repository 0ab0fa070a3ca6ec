/* A fake libnvidia-ml.so.1 with the calls that router/gpu/nvml.py makes, so that the real nvidia-ml-py can be tested
 * against fixed values. EMULATED: no GPU is involved. FAKE_NVML is a comma-separated list of behaviours:
 *   none          no GPU                           nov2       no version 2 of the memory call
 *   bare          all optional values unsupported  mig        GPU 1 is in MIG mode with two devices
 *   lost1         GPU 1 is lost at the second and third reading of its memory, and back at the fourth
 *   gone1         GPU 1 has no handle              noinit     the driver does not answer
 *   oldprocs      only version 2 of the process calls
 *   xid1           GPU 1 reports XID 79 before the second reading
 *   noevents       the driver has no event sets
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, TIMEOUT = 10, FUNCTION_NOT_FOUND = 13,
       GPU_IS_LOST = 15, LIB_RM_VERSION_MISMATCH = 18 };

#define MIB (1024ull * 1024ull)
#define GIB (1024ull * MIB)

typedef struct { int index; int part; } *device;
typedef struct { unsigned long long total, free, used; } memory_v1;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2;
typedef struct { unsigned pid; unsigned long long bytes; unsigned gpu_instance, compute_instance; } process_info;
typedef struct { unsigned gpu, memory; } utilization;

static struct { int index; int part; } devices[4] = {{0, -1}, {1, -1}, {1, 0}, {1, 1}};
static int memory_reads[2];

static int plays(const char *word) {
    const char *all = getenv("FAKE_NVML");
    const char *at = all ? strstr(all, word) : NULL;
    return at && (at[strlen(word)] == ',' || at[strlen(word)] == 0);
}
static int is_lost(device d) { return d->index == 1 && plays("lost1") && memory_reads[1] >= 2 && memory_reads[1] < 4; }
static int optional(device d) { return is_lost(d) ? GPU_IS_LOST : plays("bare") || d->part >= 0 ? NOT_SUPPORTED : OK; }

#define VALUE(name, value) int name(device d, unsigned *out) { int e = optional(d); if (!e) *out = (value); return e; }

int nvmlInitWithFlags(unsigned flags) { (void)flags; return plays("noinit") ? LIB_RM_VERSION_MISMATCH : OK; }
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int code) { return code == GPU_IS_LOST ? "GPU is lost" : "emulated error"; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = plays("none") ? 0 : 2; return OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, device *out) {
    if (index > 1) return INVALID_ARGUMENT;
    if (index == 1 && plays("gone1")) return GPU_IS_LOST;
    *out = (device)&devices[index];
    return OK;
}
int nvmlDeviceGetMigMode(device d, unsigned *current, unsigned *pending) {
    if (!plays("mig")) return NOT_SUPPORTED;
    *current = *pending = d->index == 1;
    return OK;
}
int nvmlDeviceGetMaxMigDeviceCount(device d, unsigned *count) { (void)d; *count = 7; return OK; }
int nvmlDeviceGetMigDeviceHandleByIndex(device d, unsigned index, device *out) {
    (void)d;
    if (index != 0 && index != 3) return NOT_FOUND; /* numbers have gaps */
    *out = (device)&devices[index ? 3 : 2];
    return OK;
}
int nvmlDeviceGetUUID(device d, char *text, unsigned length) {
    if (d->part >= 0) snprintf(text, length, "MIG-00000000-0000-0000-0000-00000000000%d", d->part);
    else snprintf(text, length, "GPU-0000000%d-1111-2222-3333-444444444444", d->index);
    return OK;
}
int nvmlDeviceGetName(device d, char *text, unsigned length) {
    snprintf(text, length, d->index ? "NVIDIA GeForce RTX 4090" : "NVIDIA GeForce RTX 3090");
    return OK;
}
static int read_memory(device d) {
    if (d->part < 0) memory_reads[d->index]++;
    return is_lost(d) ? GPU_IS_LOST : OK;
}
int nvmlDeviceGetMemoryInfo(device d, memory_v1 *out) {
    int e = plays("nov2") ? read_memory(d) : is_lost(d) ? GPU_IS_LOST : OK;
    if (e) return e;
    out->total = 24 * GIB; out->used = 2 * GIB + 300 * MIB; out->free = out->total - out->used;
    return OK;
}
int nvmlDeviceGetMemoryInfo_v2(device d, memory_v2 *out) {
    int e = plays("nov2") ? FUNCTION_NOT_FOUND : read_memory(d);
    if (e) return e;
    if (out->version != (sizeof(memory_v2) | 2u << 24)) return INVALID_ARGUMENT;
    out->total = (d->part >= 0 ? 10 : 24) * GIB; out->reserved = 300 * MIB; out->used = 2 * GIB;
    out->free = out->total - out->used - out->reserved;
    return OK;
}
int nvmlDeviceGetCudaComputeCapability(device d, int *major, int *minor) {
    int e = optional(d);
    if (!e) { *major = 8; *minor = d->index ? 9 : 6; }
    return e;
}
int nvmlSystemGetDriverVersion(char *text, unsigned length) { snprintf(text, length, "570.133.20"); return OK; }
VALUE(nvmlDeviceGetPersistenceMode, d->index)
int nvmlDeviceGetEccMode(device d, unsigned *current, unsigned *pending) {
    *current = 0; *pending = 1;
    return optional(d);
}
int nvmlDeviceGetTotalEccErrors(device d, unsigned kind, unsigned counter, unsigned long long *out) {
    if (kind != 1 || counter != 0) return INVALID_ARGUMENT; /* uncorrected, since the driver was loaded */
    *out = 3;
    return optional(d);
}
int nvmlDeviceGetRemappedRows(device d, unsigned *corrected, unsigned *uncorrected, unsigned *pending, unsigned *failed) {
    *corrected = *uncorrected = *pending = 0; *failed = d->index;
    return optional(d);
}
VALUE(nvmlDeviceGetCurrPcieLinkGeneration, 1)
VALUE(nvmlDeviceGetMaxPcieLinkGeneration, 4)
VALUE(nvmlDeviceGetCurrPcieLinkWidth, 8)
VALUE(nvmlDeviceGetMaxPcieLinkWidth, 16)
VALUE(nvmlDeviceGetPowerUsage, 30500)
VALUE(nvmlDeviceGetEnforcedPowerLimit, 350000)
VALUE(nvmlDeviceGetMemoryBusWidth, 384)
int nvmlDeviceGetTemperature(device d, unsigned sensor, unsigned *out) {
    if (sensor != 0) return INVALID_ARGUMENT;
    *out = 41;
    return optional(d);
}
int nvmlDeviceGetMaxClockInfo(device d, unsigned kind, unsigned *out) {
    if (kind != 2) return INVALID_ARGUMENT; /* NVML_CLOCK_MEM */
    *out = d->index ? 10501 : 9751;
    return optional(d);
}
int nvmlDeviceGetUtilizationRates(device d, utilization *out) {
    out->gpu = 75; out->memory = 40;
    return optional(d);
}
int nvmlDeviceGetCurrentClocksThrottleReasons(device d, unsigned long long *out) {
    *out = d->index ? 0x81 : 0x04; /* an idle GPU, and the power brake; a power cap */
    return optional(d);
}
typedef struct { device device; unsigned long long type, data; unsigned gpu_instance, compute_instance; } event_data;
static int event_sets, registered, waits;
int nvmlEventSetCreate(void **set) { *set = &event_sets; return plays("noevents") ? NOT_SUPPORTED : OK; }
int nvmlDeviceRegisterEvents(device d, unsigned long long types, void *set) {
    if (types != 8 || set != &event_sets) return INVALID_ARGUMENT;
    registered |= 1 << d->index;
    return OK;
}
int nvmlEventSetWait_v2(void *set, event_data *out, unsigned milliseconds) {
    if (set != &event_sets || milliseconds) return INVALID_ARGUMENT;
    if (!plays("xid1") || ++waits != 2 || registered != 3) return TIMEOUT;
    *out = (event_data){(device)&devices[1], 8, 79, ~0u, ~0u};
    return OK;
}
static int list(device d, unsigned *count, process_info *out, const process_info *held, unsigned n) {
    int e = optional(d);
    if (e) return e;
    if (*count < n) { *count = n; return INSUFFICIENT_SIZE; }
    memcpy(out, held, n * sizeof *out);
    *count = n;
    return OK;
}
static int compute(device d, unsigned *count, process_info *out) {
    static const process_info held[] = {{4321, 1500 * MIB, ~0u, ~0u}, {1234, ~0ull, ~0u, ~0u}};
    return list(d, count, out, held, d->index ? 0 : 2);
}
static int graphics(device d, unsigned *count, process_info *out) {
    static const process_info held[] = {{4321, 1500 * MIB, ~0u, ~0u}, {777, 12 * MIB, ~0u, ~0u}};
    return list(d, count, out, held, d->index ? 0 : 2);
}
int nvmlDeviceGetComputeRunningProcesses_v2(device d, unsigned *n, process_info *out) { return compute(d, n, out); }
int nvmlDeviceGetGraphicsRunningProcesses_v2(device d, unsigned *n, process_info *out) { return graphics(d, n, out); }
int nvmlDeviceGetComputeRunningProcesses_v3(device d, unsigned *n, process_info *out) {
    return plays("oldprocs") ? FUNCTION_NOT_FOUND : compute(d, n, out);
}
int nvmlDeviceGetGraphicsRunningProcesses_v3(device d, unsigned *n, process_info *out) {
    return plays("oldprocs") ? FUNCTION_NOT_FOUND : graphics(d, n, out);
}
