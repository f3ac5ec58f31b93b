/* The calls of CUDA's driver that `cuda_driver` makes, on this process's memory; a call that would leave an allocation aborts. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { MOST = 65536 };
static struct { char *start; size_t size; } known[MOST];
static int count, live;

static void inside(uint64_t address, size_t size) {
  for (int i = 0; i < count; ++i) {
    char *start = known[i].start;
    if (start && (char *)address >= start && (char *)address + size <= start + known[i].size) return;
  }
  abort();
}

int cuInit(unsigned flags) { return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = &live; return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
static __thread void *current;
int cuCtxSetCurrent(void *context) { current = context; return 0; }
int cuStreamCreate(void **stream, unsigned flags) { *stream = &count; return current ? 0 : 201; }
int cuStreamDestroy_v2(void *stream) { return 0; }
int cuStreamSynchronize(void *stream) { return current && stream == (void *)&count ? 0 : 201; }
int cuMemAlloc_v2(uint64_t *address, size_t size) {
  if (!current) return 201;
  if (size > (size_t)8 << 30 || count == MOST) return 2;
  known[count].start = aligned_alloc(256, (size + 255) / 256 * 256);
  memset(known[count].start, 0xff, size); /* not a number, until something is written */
  known[count].size = size;
  *address = (uint64_t)known[count++].start;
  ++live;
  return 0;
}
int cuMemFree_v2(uint64_t address) {
  for (int i = 0; i < count; ++i)
    if (known[i].start == (char *)address) { free(known[i].start); known[i].start = 0; --live; return 0; }
  abort();
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t size, void *stream) { inside(to, size); memcpy((void *)to, from, size); return 0; }
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t size, void *stream) { inside(from, size); memcpy(to, (void *)from, size); return 0; }
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t size, void *stream) { inside(to, size); inside(from, size); memmove((void *)to, (void *)from, size); return 0; }
int cuMemsetD2D8Async(uint64_t at, size_t pitch, unsigned char value, size_t width, size_t height, void *stream) {
  inside(at, pitch * (height - 1) + width);
  for (size_t i = 0; i < height; ++i) memset((char *)at + i * pitch, value, width);
  return 0;
}
int stand_in_live(void) { return live; }
