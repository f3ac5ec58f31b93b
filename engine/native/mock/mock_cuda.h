// What a test can set in, and read from, the driver's stand-in.
#ifndef MOSEAR_MOCK_CUDA_H_
#define MOSEAR_MOCK_CUDA_H_

#include <cuda.h>

#include <cstdint>

struct MockLaunch {
  unsigned grid[3];
  unsigned threads;
  unsigned shared_bytes;
  int image_arch;  // of the binary that was loaded
  uint64_t values[64];
};

extern "C" {
// Of every device; else the environment's MOCK_CUDA_CAPABILITY counts.
void MockSetCapability(int capability);
// Which context is current; each is on a device of its own.
void MockSetContext(unsigned long long context);
// The next call of this function fails with `status`: "load", "function", "attribute", "launch", "device".
void MockFailNext(const char* call, CUresult status);
int MockLoads();
int MockUnloads();
int MockLaunches();
// Largest dynamic shared memory that a function was allowed, 0 where none was.
int MockSharedAllowed();
const MockLaunch* MockLastLaunch();
}

#endif  // MOSEAR_MOCK_CUDA_H_
