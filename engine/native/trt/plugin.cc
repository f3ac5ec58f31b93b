// libmosear_trt_plugin.so: `mosear::ReallocatedAttention` for TensorRT 10 and 11, over the kernels of
// libmosear_kernels.
//
// One node serves prefill (many rows: one launch) and decode (one row: a split and a merge, partial results in the
// workspace). TensorRT loads it by IPluginRegistry::loadLibrary, or `trtexec --dynamicPlugins`.
#include <NvInfer.h>
#include <NvInferRuntime.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "attention.h"

namespace mosear::trt {
namespace {

using namespace nvinfer1;

constexpr char kName[] = "ReallocatedAttention", kVersion[] = "1", kNamespace[] = "mosear";
constexpr int kInputs = 10, kOutputs = 3;
// In the op's order: data, then ids and lengths, then floats; output, masses before and after.
enum class Kind { kData, kInt32, kFloat };
constexpr std::array<Kind, kInputs + kOutputs> kKinds = {
    Kind::kData,  Kind::kData,  Kind::kData,  Kind::kInt32, Kind::kInt32, Kind::kInt32, Kind::kInt32,
    Kind::kFloat, Kind::kFloat, Kind::kFloat, Kind::kData,  Kind::kFloat, Kind::kFloat};
constexpr std::array<int, kInputs> kRanks = {4, 4, 4, 2, 2, 1, 1, 2, 1, 2};

std::atomic<ILoggerFinder*> logger_finder{nullptr};

void Say(const std::string& text) {
  ILoggerFinder* finder = logger_finder.load();
  ILogger* logger = finder == nullptr ? nullptr : finder->findLogger();
  if (logger != nullptr) {
    logger->log(ILogger::Severity::kERROR, ("mosear: " + text).c_str());
  } else {
    std::fprintf(stderr, "mosear: %s\n", text.c_str());
  }
}

const char* DataName(DataType type) {
  return type == DataType::kHALF ? "fp16" : type == DataType::kBF16 ? "bf16" : nullptr;
}

// Sizes from dimensions of query, key and group_bias.
Sizes SizesOf(const Dims& query, const Dims& key, const Dims& bias) {
  return Sizes{query.d[0], query.d[1], query.d[2], query.d[3], key.d[1], key.d[2], bias.d[1]};
}

class Attention final : public IPluginV3,
                        public IPluginV3OneCore,
                        public IPluginV3OneBuild,
                        public IPluginV3OneRuntime {
 public:
  explicit Attention(Attributes attributes) : attributes_(std::move(attributes)) {}

  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    switch (type) {
      case PluginCapabilityType::kCORE:
        return static_cast<IPluginV3OneCore*>(this);
      case PluginCapabilityType::kBUILD:
        return static_cast<IPluginV3OneBuild*>(this);
      case PluginCapabilityType::kRUNTIME:
        return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }
  IPluginV3* clone() noexcept override { return new (std::nothrow) Attention(attributes_); }

  const char* getPluginName() const noexcept override { return kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }
  int32_t getNbOutputs() const noexcept override { return kOutputs; }

  int32_t configurePlugin(const DynamicPluginTensorDesc* in, int32_t inputs, const DynamicPluginTensorDesc*,
                          int32_t outputs) noexcept override {
    if (inputs != kInputs || outputs != kOutputs) return -1;
    for (int i = 0; i < kInputs; ++i) {
      if (in[i].desc.dims.nbDims == kRanks[i]) continue;
      Say("input " + std::to_string(i) + " of ReallocatedAttention has " + std::to_string(in[i].desc.dims.nbDims) +
          " axes: it must have " + std::to_string(kRanks[i]));
      return -1;
    }
    return 0;
  }

  int32_t getOutputDataTypes(DataType* out, int32_t outputs, const DataType* in,
                             int32_t inputs) const noexcept override {
    if (inputs != kInputs || outputs != kOutputs) return -1;
    out[0] = in[0];
    out[1] = out[2] = DataType::kFLOAT;
    return 0;
  }

  int32_t getOutputShapes(const DimsExprs* in, int32_t inputs, const DimsExprs*, int32_t, DimsExprs* out,
                          int32_t outputs, IExprBuilder&) noexcept override {
    if (inputs != kInputs || outputs != kOutputs || in[0].nbDims != 4 || in[9].nbDims != 2) return -1;
    out[0] = in[0];
    out[1] = in[0];
    out[1].d[3] = in[9].d[1];  // the groups
    out[2] = out[1];
    return 0;
  }

  bool supportsFormatCombination(int32_t at, const DynamicPluginTensorDesc* all, int32_t inputs,
                                 int32_t outputs) noexcept override {
    if (inputs != kInputs || outputs != kOutputs || at < 0 || at >= kInputs + kOutputs) return false;
    const PluginTensorDesc& tensor = all[at].desc;
    if (tensor.format != TensorFormat::kLINEAR) return false;
    switch (kKinds[at]) {
      case Kind::kInt32:
        return tensor.type == DataType::kINT32;
      case Kind::kFloat:
        return tensor.type == DataType::kFLOAT;
      case Kind::kData:
        return at == 0 ? DataName(tensor.type) != nullptr : tensor.type == all[0].desc.type;
    }
    return false;
  }

  size_t getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t inputs, const DynamicPluginTensorDesc*,
                          int32_t) const noexcept override {
    if (inputs != kInputs) return 0;
    return WorkspaceBytes(SizesOf(in[0].max, in[1].max, in[9].max), in[0].min.d[2]);
  }

  int32_t onShapeChange(const PluginTensorDesc*, int32_t, const PluginTensorDesc*, int32_t) noexcept override {
    return 0;
  }

  int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* inputs, void* const* outputs,
                  void* workspace, cudaStream_t stream) noexcept override try {
    Tensors tensors{};
    std::memcpy(tensors.inputs, inputs, sizeof tensors.inputs);
    std::memcpy(tensors.outputs, outputs, sizeof tensors.outputs);
    const char* data = DataName(in[0].type);
    if (data == nullptr) return -1;
    std::string error;
    const CUresult status = Launch(attributes_, data, SizesOf(in[0].dims, in[1].dims, in[9].dims), tensors, workspace,
                                   reinterpret_cast<CUstream>(stream), &error);
    if (status == CUDA_SUCCESS) return 0;
    Say(error.empty() ? "the driver refused a launch of ReallocatedAttention: status " + std::to_string(status)
                      : error);
    return -1;
  } catch (const std::bad_alloc&) {
    return -1;
  }

  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

  const PluginFieldCollection* getFieldsToSerialize() noexcept override {
    fields_ = {
        PluginField{"policy", attributes_.policy.data(), PluginFieldType::kCHAR, Length(attributes_.policy)},
        PluginField{"statistic", attributes_.statistic.data(), PluginFieldType::kCHAR, Length(attributes_.statistic)},
        PluginField{"scale", &attributes_.scale, PluginFieldType::kFLOAT32, 1}};
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    return &collection_;
  }

 private:
  static int32_t Length(const std::string& text) { return static_cast<int32_t>(text.size()); }

  Attributes attributes_;
  std::array<PluginField, 3> fields_;
  PluginFieldCollection collection_{};
};

// What a field says, or why it cannot be used.
bool Read(const PluginField& field, Attributes* attributes, std::string* error) {
  const std::string name = field.name == nullptr ? "" : field.name;
  std::string* word = name == "policy" ? &attributes->policy : name == "statistic" ? &attributes->statistic : nullptr;
  if (word != nullptr && field.type == PluginFieldType::kCHAR && field.data != nullptr && field.length > 0) {
    word->assign(static_cast<const char*>(field.data), static_cast<size_t>(field.length));
    word->resize(std::strlen(word->c_str()));  // some callers count the final zero
    return true;
  }
  if (name == "scale" && field.type == PluginFieldType::kFLOAT32 && field.data != nullptr && field.length == 1) {
    std::memcpy(&attributes->scale, field.data, sizeof attributes->scale);
    return true;
  }
  if (name == "plugin_namespace" || name == "plugin_version" || name == "aot") return true;  // for the parser
  *error = "field '" + name +
           "' of ReallocatedAttention is unknown or of a wrong type: policy, statistic (text), scale (float)";
  return false;
}

class Creator final : public IPluginCreatorV3One {
 public:
  const char* getPluginName() const noexcept override { return kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }
  const PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }

  IPluginV3* createPlugin(const char*, const PluginFieldCollection* given, TensorRTPhase) noexcept override try {
    Attributes attributes;
    std::string error;
    for (int32_t i = 0; given != nullptr && i < given->nbFields; ++i) {
      if (Read(given->fields[i], &attributes, &error)) continue;
      Say(error);
      return nullptr;
    }
    if (!attributes.Valid()) {
      Say("ReallocatedAttention has policy '" + attributes.policy + "', statistic '" + attributes.statistic +
          "', scale " + std::to_string(attributes.scale) + ": off, balance or target; sum or mean; above 0");
      return nullptr;
    }
    return new Attention(attributes);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }

 private:
  std::array<PluginField, 3> fields_ = {PluginField{"policy", nullptr, PluginFieldType::kCHAR, 0},
                                        PluginField{"statistic", nullptr, PluginFieldType::kCHAR, 0},
                                        PluginField{"scale", nullptr, PluginFieldType::kFLOAT32, 1}};
  PluginFieldCollection collection_{static_cast<int32_t>(fields_.size()), fields_.data()};
};

}  // namespace
}  // namespace mosear::trt

#define MOSEAR_EXPORT extern "C" __attribute__((visibility("default")))

MOSEAR_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { mosear::trt::logger_finder = finder; }

MOSEAR_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static mosear::trt::Creator creator;
  static nvinfer1::IPluginCreatorInterface* list[] = {&creator};
  count = 1;
  return list;
}
