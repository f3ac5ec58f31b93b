// mosear_run PLAN --inputs DIR [--outputs DIR] [--profile N] [--repeat N] [--plugin LIBRARY]
//
// Loads a plan from its engine folder, feeds DIR/<tensor>.npy, times it and writes the outputs. Before TensorRT sees a
// byte the plan is compared with its manifest. TensorRT's library is opened when it is needed, so that this builds
// without it.
#include <NvInferRuntime.h>
#include <cuda.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "manifest.h"
#include "npy.h"

namespace {

using mosear::run::Array;
namespace fs = std::filesystem;

constexpr char kUsage[] =
    "usage: mosear_run PLAN --inputs DIR [--outputs DIR] [--profile N] [--repeat N] [--plugin LIBRARY]";

[[noreturn]] void Fail(const std::string& what) { throw std::runtime_error(what); }

void Check(CUresult status, const char* what) {
  if (status != CUDA_SUCCESS) Fail(std::string(what) + ": the driver says status " + std::to_string(status));
}

struct Options {
  fs::path plan, inputs, outputs, plugin;
  int profile = 0, repeat = 10;
};

int Count(const std::string& name, const std::string& text, int least) {
  char* end = nullptr;
  const long found = std::strtol(text.c_str(), &end, 10);
  if (*end != '\0' || text.empty() || found < least || found > 1000000)
    Fail(name + " is '" + text + "': a number from " + std::to_string(least));
  return static_cast<int>(found);
}

Options Parse(int count, char** words) {
  Options found;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    if (word.rfind("--", 0) != 0) {
      if (!found.plan.empty()) Fail(kUsage);
      found.plan = word;
      continue;
    }
    if (i + 1 == count) Fail(word + " wants a value\n" + kUsage);
    const std::string value = words[++i];
    if (word == "--inputs")
      found.inputs = value;
    else if (word == "--outputs")
      found.outputs = value;
    else if (word == "--plugin")
      found.plugin = value;
    else if (word == "--profile")
      found.profile = Count(word, value, 0);
    else if (word == "--repeat")
      found.repeat = Count(word, value, 1);
    else
      Fail(word + " is unknown\n" + kUsage);
  }
  if (found.plan.empty() || found.inputs.empty()) Fail(kUsage);
  return found;
}

class Logger final : public nvinfer1::ILogger {
  void log(Severity severity, const char* text) noexcept override {
    if (severity <= Severity::kWARNING) std::fprintf(stderr, "TensorRT: %s\n", text);
  }
};

// TensorRT's library of the headers' major version.
struct Library {
  Library() : name("libnvinfer.so." + std::to_string(NV_TENSORRT_MAJOR)), handle(dlopen(name.c_str(), RTLD_NOW)) {
    if (handle == nullptr)
      Fail(name + " cannot be opened (" + dlerror() + "): install TensorRT " + std::to_string(NV_TENSORRT_MAJOR));
  }
  template <typename Function>
  Function Find(const char* symbol) const {
    auto found = reinterpret_cast<Function>(dlsym(handle, symbol));
    if (found == nullptr) Fail(name + " has no " + symbol);
    return found;
  }
  std::string Version() const {
    const int number = Find<int (*)()>("getInferLibVersion")();
    return std::to_string(number / 10000) + "." + std::to_string(number / 100 % 100) + "." +
           std::to_string(number % 100);
  }
  std::string name;
  void* handle;
};

std::string KindOf(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kFLOAT:
      return "f4";
    case nvinfer1::DataType::kHALF:
      return "f2";
    case nvinfer1::DataType::kINT32:
      return "i4";
    case nvinfer1::DataType::kINT64:
      return "i8";
    case nvinfer1::DataType::kUINT8:
      return "u1";
    case nvinfer1::DataType::kBOOL:
      return "b1";
    default:
      Fail("a tensor has a type that .npy does not know: cast it to fp32 in the graph");
  }
}

// Device memory of a tensor.
struct Memory {
  explicit Memory(size_t size) { Check(cuMemAlloc(&address, std::max<size_t>(size, 1)), "no device memory"); }
  ~Memory() { cuMemFree(address); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  CUdeviceptr address = 0;
};

using Tensors = std::map<std::string, std::unique_ptr<Memory>>;

void Feed(nvinfer1::ICudaEngine& engine, nvinfer1::IExecutionContext& context, const fs::path& folder,
          Tensors& memory) {
  for (int i = 0; i < engine.getNbIOTensors(); ++i) {
    const char* name = engine.getIOTensorName(i);
    if (engine.getTensorIOMode(name) != nvinfer1::TensorIOMode::kINPUT) continue;
    const Array array = mosear::run::ReadNpy(folder / (std::string(name) + ".npy"));
    const std::string wanted = KindOf(engine.getTensorDataType(name));
    if (array.kind != wanted) Fail(std::string(name) + ".npy holds " + array.kind + ": the plan takes " + wanted);
    nvinfer1::Dims shape{static_cast<int32_t>(array.shape.size()), {}};
    if (array.shape.size() > nvinfer1::Dims::MAX_DIMS) Fail(std::string(name) + ".npy has too many axes");
    std::copy(array.shape.begin(), array.shape.end(), shape.d);
    if (!context.setInputShape(name, shape)) Fail(std::string(name) + ".npy has a shape outside the profile");
    memory[name] = std::make_unique<Memory>(array.bytes.size());
    Check(cuMemcpyHtoD(memory[name]->address, array.bytes.data(), array.bytes.size()), name);
    context.setTensorAddress(name, reinterpret_cast<void*>(memory[name]->address));
  }
}

std::map<std::string, Array> Outputs(nvinfer1::ICudaEngine& engine, nvinfer1::IExecutionContext& context,
                                     Tensors& memory) {
  std::map<std::string, Array> found;
  for (int i = 0; i < engine.getNbIOTensors(); ++i) {
    const char* name = engine.getIOTensorName(i);
    if (engine.getTensorIOMode(name) != nvinfer1::TensorIOMode::kOUTPUT) continue;
    Array array{KindOf(engine.getTensorDataType(name)), {}, {}};
    const nvinfer1::Dims shape = context.getTensorShape(name);
    size_t bytes = static_cast<size_t>(array.kind[1] - '0');
    for (int d = 0; d < shape.nbDims; ++d) {
      if (shape.d[d] < 0) Fail(std::string(name) + " has a shape that is not known beforehand");
      array.shape.push_back(shape.d[d]);
      bytes *= static_cast<size_t>(shape.d[d]);
    }
    array.bytes.resize(bytes);
    memory[name] = std::make_unique<Memory>(bytes);
    context.setTensorAddress(name, reinterpret_cast<void*>(memory[name]->address));
    found.emplace(name, std::move(array));
  }
  return found;
}

// Milliseconds of each run, in order; the first runs warm up and are left out.
std::vector<float> Time(nvinfer1::IExecutionContext& context, CUstream stream, int repeat) {
  constexpr int kWarmUp = 3;
  CUevent start, stop;
  Check(cuEventCreate(&start, CU_EVENT_DEFAULT), "event");
  Check(cuEventCreate(&stop, CU_EVENT_DEFAULT), "event");
  std::vector<float> found;
  for (int i = -kWarmUp; i < repeat; ++i) {
    Check(cuEventRecord(start, stream), "event");
    if (!context.enqueueV3(reinterpret_cast<cudaStream_t>(stream))) Fail("TensorRT refused to run the plan");
    Check(cuEventRecord(stop, stream), "event");
    Check(cuEventSynchronize(stop), "the run failed");
    float milliseconds = 0;
    Check(cuEventElapsedTime(&milliseconds, start, stop), "event");
    if (i >= 0) found.push_back(milliseconds);
  }
  cuEventDestroy(start);
  cuEventDestroy(stop);
  return found;
}

int Run(const Options& options) {
  CUdevice device;
  CUcontext driver;
  int major, minor;
  Check(cuInit(0), "no device");
  Check(cuDeviceGet(&device, 0), "no device");
  Check(cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device), "capability");
  Check(cuDeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device), "capability");
  const mosear::run::Needs needs = mosear::run::CheckPlan(options.plan, 10 * major + minor);
  const Library library;
  mosear::run::CheckVersion(options.plan, needs, library.Version());
  Check(cuDevicePrimaryCtxRetain(&driver, device), "no context");
  Check(cuCtxSetCurrent(driver), "no context");
  std::ifstream file(options.plan, std::ios::binary);
  const std::vector<char> plan(std::istreambuf_iterator<char>(file), {});
  Logger logger;
  const auto create = library.Find<void* (*)(void*, int32_t)>("createInferRuntime_INTERNAL");
  const std::unique_ptr<nvinfer1::IRuntime> runtime(
      static_cast<nvinfer1::IRuntime*>(create(&logger, NV_TENSORRT_VERSION)));
  if (runtime == nullptr) Fail("TensorRT's runtime cannot be made");
  if (!options.plugin.empty() && runtime->getPluginRegistry().loadLibrary(options.plugin.c_str()) == nullptr) {
    Fail(options.plugin.string() + " cannot be loaded as a plugin library");
  }
  const std::unique_ptr<nvinfer1::ICudaEngine> engine(runtime->deserializeCudaEngine(plan.data(), plan.size()));
  if (engine == nullptr) Fail(options.plan.string() + " cannot be deserialised: TensorRT says why above");
  const std::unique_ptr<nvinfer1::IExecutionContext> context(engine->createExecutionContext());
  CUstream stream;
  Check(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING), "stream");
  if (!context->setOptimizationProfileAsync(options.profile, reinterpret_cast<cudaStream_t>(stream))) {
    Fail("--profile is " + std::to_string(options.profile) + ": the plan has " +
         std::to_string(engine->getNbOptimizationProfiles()));
  }
  Check(cuStreamSynchronize(stream), "profile");
  Tensors memory;
  Feed(*engine, *context, options.inputs, memory);
  std::map<std::string, Array> outputs = Outputs(*engine, *context, memory);
  std::vector<float> times = Time(*context, stream, options.repeat);
  std::sort(times.begin(), times.end());
  const auto quantile = [&](double share) {
    return times[static_cast<size_t>(share * static_cast<double>(times.size() - 1) + 0.5)];
  };
  std::printf("n %zu, p50 %.3f ms, p90 %.3f ms, p99 %.3f ms\n", times.size(), quantile(0.5), quantile(0.9),
              quantile(0.99));
  for (auto& [name, array] : outputs) {
    if (options.outputs.empty()) break;
    Check(cuMemcpyDtoH(array.bytes.data(), memory[name]->address, array.bytes.size()), name.c_str());
    fs::create_directories(options.outputs);
    mosear::run::WriteNpy(options.outputs / (name + ".npy"), array);
  }
  return EXIT_SUCCESS;
}

}  // namespace

int main(int count, char** words) try { return Run(Parse(count, words)); } catch (const std::exception& error) {
  std::fprintf(stderr, "mosear_run: %s\n", error.what());
  return EXIT_FAILURE;
}
