#include "mosear/kernels.h"

#include <map>
#include <mutex>
#include <new>
#include <utility>

#include "kernels_table.h"

namespace mosear {
namespace {

constexpr unsigned kSharedWithoutOptIn = 48 * 1024;
constexpr int kFirstExactArch = 90;  // sm_90a, sm_100a and sm_120a run on exactly that chip
constexpr uint64_t kAlignment = 16;
constexpr size_t kHiddenPointers = 2;  // scratch, which no kernel here uses: null

// Functions by context and binary. A context's id is never used again, unlike its address.
std::mutex cache_mutex;
std::map<std::pair<unsigned long long, const Variant*>, CUfunction>& Cache() {
  static auto* cache = new std::map<std::pair<unsigned long long, const Variant*>, CUfunction>;
  return *cache;  // never destroyed: a launch may come while statics end
}

CUresult Load(const Variant& variant, CUfunction* function) {
  CUmodule module;
  if (CUresult status = cuModuleLoadData(&module, variant.image)) return status;
  CUresult status = cuModuleGetFunction(function, module, variant.symbol);
  if (status == CUDA_SUCCESS && variant.shared_bytes > kSharedWithoutOptIn) {
    status = cuFuncSetAttribute(*function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                static_cast<int>(variant.shared_bytes));
  }
  if (status != CUDA_SUCCESS) cuModuleUnload(module);
  return status;
}

CUresult Find(const Variant& variant, CUfunction* function) {
  unsigned long long context;
  if (CUresult status = cuCtxGetId(nullptr, &context)) return status;
  std::lock_guard<std::mutex> lock(cache_mutex);
  const auto key = std::make_pair(context, &variant);
  if (auto found = Cache().find(key); found != Cache().end()) {
    *function = found->second;
    return CUDA_SUCCESS;
  }
  if (CUresult status = Load(variant, function)) return status;
  Cache().emplace(key, *function);
  return CUDA_SUCCESS;
}

}  // namespace

CUresult CurrentCapability(int* capability) {
  CUdevice device;
  if (CUresult status = cuCtxGetDevice(&device)) return status;
  int major, minor;
  if (CUresult status = cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device))
    return status;
  if (CUresult status = cuDeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device))
    return status;
  *capability = 10 * major + minor;
  return CUDA_SUCCESS;
}

bool Variant::Find(std::string_view constant, double* value) const {
  for (size_t i = 0; i < constant_count; ++i) {
    if (constant != constants[i].name) continue;
    *value = constants[i].value;
    return true;
  }
  return false;
}

const Variant* Kernel::Pick(int capability) const {
  const Variant* best = nullptr;
  for (size_t i = 0; i < variant_count_; ++i) {
    const Variant& variant = variants_[i];
    const bool exact = variant.arch == capability;
    const bool same_major = variant.arch / 10 == capability / 10;
    const bool older = variant.arch < kFirstExactArch && same_major && variant.arch < capability;
    if ((exact || older) && (best == nullptr || variant.arch > best->arch)) best = &variant;
  }
  return best;
}

CUresult Kernel::Launch(CUstream stream, const std::vector<Argument>& arguments) const {
  return LaunchOn(stream, nullptr, arguments);
}

CUresult Kernel::Launch(CUstream stream, Grid grid, const std::vector<Argument>& arguments) const {
  return LaunchOn(stream, &grid, arguments);
}

CUresult Kernel::LaunchOn(CUstream stream, const Grid* asked, const std::vector<Argument>& arguments) const try {
  int capability;
  if (CUresult status = CurrentCapability(&capability)) return status;
  const Variant* variant = Pick(capability);
  if (variant == nullptr) return CUDA_ERROR_NO_BINARY_FOR_GPU;
  if (arguments.size() != parameter_count_) return CUDA_ERROR_INVALID_VALUE;

  std::vector<uint64_t> values(parameter_count_ + kHiddenPointers, 0);
  std::vector<void*> places(values.size());
  for (size_t i = 0; i < parameter_count_; ++i) {
    const bool misaligned = (variant->aligned >> i & 1) != 0 && arguments[i].bits() % kAlignment != 0;
    if (arguments[i].is_pointer() != parameters_[i].is_pointer || misaligned) return CUDA_ERROR_INVALID_VALUE;
    values[i] = arguments[i].bits();  // of a scalar the driver reads the lower half
  }
  for (size_t i = 0; i < values.size(); ++i) places[i] = &values[i];

  const Grid grid = asked == nullptr ? variant->grid : *asked;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return CUDA_SUCCESS;
  CUfunction function;
  if (CUresult status = Find(*variant, &function)) return status;
  return cuLaunchKernel(function, grid.x, grid.y, grid.z, variant->threads, 1, 1, variant->shared_bytes, stream,
                        places.data(), nullptr);
} catch (const std::bad_alloc&) {
  return CUDA_ERROR_OUT_OF_MEMORY;
}

KernelList Kernels() { return KernelList{kKernels, kKernelCount}; }

const Kernel* FindKernel(std::string_view name, std::string_view data, std::string_view label) {
  for (const Kernel& kernel : Kernels()) {
    if (kernel.name() == name && kernel.data() == data && kernel.label() == label) return &kernel;
  }
  return nullptr;
}

}  // namespace mosear
