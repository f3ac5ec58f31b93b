// Stands in for libcuda.so.1: takes binaries for the claimed chip alone, and records launches.
#include "mock_cuda.h"

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

struct CUmod_st {
  int arch;
};
struct CUfunc_st {
  int arch;
  int shared_allowed;
};

namespace {

std::mutex mutex;
int set_capability = 0;
unsigned long long context = 1;
int loads = 0, unloads = 0, launches = 0, shared_allowed = 0;
std::map<std::string, CUresult> failures;
MockLaunch last_launch;

int Capability() {
  if (set_capability != 0) return set_capability;
  const char* text = std::getenv("MOCK_CUDA_CAPABILITY");
  return text == nullptr ? 90 : std::atoi(text);
}

CUresult Failure(const char* call) {
  auto found = failures.find(call);
  if (found == failures.end()) return CUDA_SUCCESS;
  CUresult status = found->second;
  failures.erase(found);
  return status;
}

// The architecture in an ELF's flags: bits 0-7 up to ABI 7, bits 8-15 from ABI 8 on.
int ArchOf(const void* image) {
  const auto* bytes = static_cast<const unsigned char*>(image);
  constexpr unsigned char kCudaMachine = 190;
  if (std::memcmp(bytes, "\x7f" "ELF", 4) != 0 || bytes[18] != kCudaMachine) return -1;
  unsigned flags;
  std::memcpy(&flags, bytes + 48, sizeof flags);
  return static_cast<int>(bytes[8] >= 8 ? flags >> 8 & 0xff : flags & 0xff);
}

bool RunsOn(int arch, int capability) {
  if (arch >= 90) return arch == capability;
  return arch / 10 == capability / 10 && arch <= capability;
}

}  // namespace

extern "C" {

void MockSetCapability(int capability) { set_capability = capability; }
void MockSetContext(unsigned long long id) { context = id; }
void MockFailNext(const char* call, CUresult status) { failures[call] = status; }
int MockLoads() { return loads; }
int MockUnloads() { return unloads; }
int MockLaunches() { return launches; }
int MockSharedAllowed() { return shared_allowed; }
const MockLaunch* MockLastLaunch() { return &last_launch; }

CUresult cuCtxGetId(CUcontext, unsigned long long* id) {
  *id = context;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
  std::lock_guard<std::mutex> lock(mutex);
  *device = static_cast<CUdevice>(context - 1);
  return Failure("device");
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  if (attribute == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT) {
    *value = 132;
    return CUDA_SUCCESS;
  }
  *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? Capability() / 10 : Capability() % 10;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  std::lock_guard<std::mutex> lock(mutex);
  if (CUresult status = Failure("load")) return status;
  const int arch = ArchOf(image);
  if (arch < 0) return CUDA_ERROR_INVALID_IMAGE;
  if (!RunsOn(arch, Capability())) return CUDA_ERROR_NO_BINARY_FOR_GPU;
  ++loads;
  *module = new CUmod_st{arch};
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) {
  std::lock_guard<std::mutex> lock(mutex);
  ++unloads;
  delete module;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char*) {
  std::lock_guard<std::mutex> lock(mutex);
  if (CUresult status = Failure("function")) return status;
  *function = new CUfunc_st{module->arch, 48 * 1024};
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  std::lock_guard<std::mutex> lock(mutex);
  if (CUresult status = Failure("attribute")) return status;
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE;
  function->shared_allowed = shared_allowed = value;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y,
                        unsigned threads_z, unsigned shared_bytes, CUstream, void** parameters, void**) {
  std::lock_guard<std::mutex> lock(mutex);
  if (CUresult status = Failure("launch")) return status;
  if (static_cast<int>(shared_bytes) > function->shared_allowed || threads_y != 1 || threads_z != 1)
    return CUDA_ERROR_INVALID_VALUE;
  ++launches;
  last_launch = MockLaunch{{x, y, z}, threads, shared_bytes, function->arch, {}};
  // Only what every kernel here has: at least one pointer of its own and two hidden ones behind.
  for (int i = 0; i < 3; ++i) std::memcpy(&last_launch.values[i], parameters[i], 4);
  std::memcpy(&last_launch.values[0], parameters[0], 8);
  return CUDA_SUCCESS;
}

// What the runner calls beside: a device is there, and nothing on it works.
CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int) {
  *device = 0;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext*, CUdevice) { return CUDA_ERROR_NO_DEVICE; }
CUresult cuCtxSetCurrent(CUcontext) { return CUDA_ERROR_NO_DEVICE; }
CUresult cuMemAlloc(CUdeviceptr*, size_t) { return CUDA_ERROR_NO_DEVICE; }
CUresult cuMemFree(CUdeviceptr) { return CUDA_ERROR_NO_DEVICE; }
CUresult cuMemcpyHtoD(CUdeviceptr, const void*, size_t) { return CUDA_ERROR_NO_DEVICE; }
CUresult cuMemcpyDtoH(void*, CUdeviceptr, size_t) { return CUDA_ERROR_NO_DEVICE; }
CUresult cuStreamCreate(CUstream*, unsigned) { return CUDA_ERROR_NO_DEVICE; }
CUresult cuStreamSynchronize(CUstream) { return CUDA_ERROR_NO_DEVICE; }
CUresult cuEventCreate(CUevent*, unsigned) { return CUDA_ERROR_NO_DEVICE; }
CUresult cuEventRecord(CUevent, CUstream) { return CUDA_ERROR_NO_DEVICE; }
CUresult cuEventSynchronize(CUevent) { return CUDA_ERROR_NO_DEVICE; }
CUresult cuEventElapsedTime(float*, CUevent, CUevent) { return CUDA_ERROR_NO_DEVICE; }
CUresult cuEventDestroy(CUevent) { return CUDA_ERROR_NO_DEVICE; }

}  // extern "C"
