// The launcher on a stand-in for the driver, whose compute capability MOCK_CUDA_CAPABILITY says.
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "../mock/mock_cuda.h"
#include "mosear/kernels.h"

namespace {

int failures = 0;

void Expect(bool holds, const char* what, int line) {
  if (holds) return;
  std::printf("line %d: %s\n", line, what);
  ++failures;
}
#define EXPECT(condition) Expect(condition, #condition, __LINE__)

constexpr CUdeviceptr kAddress = 0x7f0000000000;

std::vector<mosear::Argument> GoodArguments(const mosear::Kernel& kernel) {
  std::vector<mosear::Argument> arguments;
  for (size_t i = 0; i < kernel.parameter_count(); ++i) {
    arguments.push_back(kernel.parameter(i).is_pointer ? mosear::Argument::Pointer(kAddress + 256 * i)
                                                       : mosear::Argument::Int32(32));
  }
  return arguments;
}

// 8.x takes the nearest binary of 8.x that is not above it; 9.0 and later their own alone. 0: none.
int ExpectedArch(const mosear::Kernel& kernel, int capability) {
  const int lowest = capability < 90 ? capability / 10 * 10 : capability;
  int best = 0;
  for (size_t i = 0; i < kernel.variant_count(); ++i) {
    const int arch = kernel.variant(i).arch;
    if (arch >= lowest && arch <= capability && arch > best) best = arch;
  }
  return best;
}

void TestKernel(const mosear::Kernel& kernel, int capability) {
  const std::vector<mosear::Argument> good = GoodArguments(kernel);
  const int expected = ExpectedArch(kernel, capability);
  const int before = MockLaunches();
  if (expected == 0) {
    EXPECT(kernel.Launch(nullptr, good) == CUDA_ERROR_NO_BINARY_FOR_GPU);
    EXPECT(MockLaunches() == before);
    return;
  }
  const mosear::Variant* variant = kernel.Pick(capability);
  EXPECT(variant != nullptr);
  if (variant == nullptr) return;
  EXPECT(variant->arch == expected);
  EXPECT(kernel.Launch(nullptr, good) == CUDA_SUCCESS);
  EXPECT(MockLaunches() == before + 1);
  const MockLaunch* launch = MockLastLaunch();
  EXPECT(launch->image_arch == expected);
  EXPECT(launch->grid[0] == variant->grid.x && launch->grid[1] == variant->grid.y);
  EXPECT(launch->grid[2] == variant->grid.z);
  EXPECT(launch->threads == variant->threads && launch->shared_bytes == variant->shared_bytes);
  EXPECT(launch->values[0] == kAddress);
  EXPECT(kernel.Launch(nullptr, mosear::Grid{3, 2, 1}, good) == CUDA_SUCCESS);
  EXPECT(launch->grid[0] == 3 && launch->grid[1] == 2 && launch->grid[2] == 1);
  EXPECT(kernel.Launch(nullptr, mosear::Grid{0, 2, 1}, good) == CUDA_SUCCESS);
  EXPECT(MockLaunches() == before + 2);
  EXPECT(mosear::FindKernel(kernel.name(), kernel.data(), kernel.label()) == &kernel);
}

void TestWrongArguments(const mosear::Kernel& kernel) {
  const std::vector<mosear::Argument> good = GoodArguments(kernel);
  const int before = MockLaunches();
  std::vector<mosear::Argument> wrong(good.begin(), good.end() - 1);
  EXPECT(kernel.Launch(nullptr, wrong) == CUDA_ERROR_INVALID_VALUE);  // too few
  wrong = good;
  wrong.push_back(mosear::Argument::Int32(0));
  EXPECT(kernel.Launch(nullptr, wrong) == CUDA_ERROR_INVALID_VALUE);  // too many
  wrong = good;
  wrong[0] = mosear::Argument::Int32(16);
  EXPECT(kernel.Launch(nullptr, wrong) == CUDA_ERROR_INVALID_VALUE);  // a number for a pointer
  wrong = good;
  wrong[0] = mosear::Argument::Pointer(kAddress + 8);
  EXPECT(kernel.Launch(nullptr, wrong) == CUDA_ERROR_INVALID_VALUE);  // not a multiple of 16 bytes
  EXPECT(kernel.Launch(nullptr, std::vector<mosear::Argument>{}) == CUDA_ERROR_INVALID_VALUE);
  EXPECT(MockLaunches() == before);
}

// A failed load is not remembered, and nothing of it stays loaded.
void TestDriverErrors(const mosear::Kernel& kernel) {
  const std::vector<mosear::Argument> good = GoodArguments(kernel);
  MockSetContext(1000);  // nothing is loaded in it
  MockFailNext("device", CUDA_ERROR_INVALID_CONTEXT);
  EXPECT(kernel.Launch(nullptr, good) == CUDA_ERROR_INVALID_CONTEXT);
  MockFailNext("load", CUDA_ERROR_OUT_OF_MEMORY);
  EXPECT(kernel.Launch(nullptr, good) == CUDA_ERROR_OUT_OF_MEMORY);
  const int unloads = MockUnloads();
  MockFailNext("function", CUDA_ERROR_NOT_FOUND);
  EXPECT(kernel.Launch(nullptr, good) == CUDA_ERROR_NOT_FOUND);
  EXPECT(MockUnloads() == unloads + 1);
  MockFailNext("launch", CUDA_ERROR_LAUNCH_FAILED);
  EXPECT(kernel.Launch(nullptr, good) == CUDA_ERROR_LAUNCH_FAILED);
  EXPECT(kernel.Launch(nullptr, good) == CUDA_SUCCESS);
  MockSetContext(1);
}

// Eight threads in two contexts load a kernel twice in all.
void TestThreads(const mosear::Kernel& kernel) {
  const std::vector<mosear::Argument> good = GoodArguments(kernel);
  const int loads = MockLoads();
  for (unsigned long long context : {2001, 2002}) {
    MockSetContext(context);
    std::vector<std::thread> threads;
    std::vector<CUresult> results(4, CUDA_ERROR_UNKNOWN);
    for (CUresult& result : results) {
      threads.emplace_back([&] { result = kernel.Launch(nullptr, good); });
    }
    for (std::thread& thread : threads) thread.join();
    for (CUresult result : results) EXPECT(result == CUDA_SUCCESS);
  }
  EXPECT(MockLoads() == loads + 2);
  MockSetContext(1);
}

// Above 48 KB a function must be allowed its shared memory; the stand-in refuses the launch otherwise.
int TestSharedMemory(int capability) {
  int above = 0;
  for (const mosear::Kernel& kernel : mosear::Kernels()) {
    const mosear::Variant* variant = kernel.Pick(capability);
    if (variant == nullptr || variant->shared_bytes <= 48 * 1024) continue;
    ++above;
    MockSetContext(3000);
    MockFailNext("attribute", CUDA_ERROR_INVALID_VALUE);
    EXPECT(kernel.Launch(nullptr, GoodArguments(kernel)) == CUDA_ERROR_INVALID_VALUE);
    EXPECT(kernel.Launch(nullptr, GoodArguments(kernel)) == CUDA_SUCCESS);
    EXPECT(MockSharedAllowed() == static_cast<int>(variant->shared_bytes));
    MockSetContext(1);
    break;
  }
  return above;
}

}  // namespace

int main() {
  const int capability = std::atoi(std::getenv("MOCK_CUDA_CAPABILITY"));
  EXPECT(mosear::Kernels().count > 0);
  EXPECT(mosear::FindKernel("no such kernel", "bf16", "") == nullptr);
  int served = 0;
  for (const mosear::Kernel& kernel : mosear::Kernels()) {
    TestKernel(kernel, capability);
    if (kernel.Pick(capability) == nullptr) continue;
    if (served++ == 0) {
      TestWrongArguments(kernel);
      TestDriverErrors(kernel);
      TestThreads(kernel);
    }
  }
  const int above = TestSharedMemory(capability);
  std::printf("capability %d: %zu kernels, %d served, above 48 KB tried %d, failures %d\n", capability,
              mosear::Kernels().count, served, above, failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
