#include "node.h"

#include <atomic>
#include <cstdio>
#include <cstring>
#include <new>

namespace mosear::trt {

using namespace nvinfer1;

namespace {
std::atomic<ILoggerFinder*> logger_finder{nullptr};
}

void SetLoggerFinder(ILoggerFinder* finder) { logger_finder = finder; }

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

int32_t Refused(const char* name, int status, const std::string& error) {
  Say(error.empty() ? std::string("the driver refused a launch of ") + name + ": status " + std::to_string(status)
                    : error);
  return -1;
}

IPluginCapability* Node::getCapabilityInterface(PluginCapabilityType type) noexcept {
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

int32_t Node::configurePlugin(const DynamicPluginTensorDesc* in, int32_t inputs, const DynamicPluginTensorDesc*,
                              int32_t outputs) noexcept {
  if (!Fits(inputs, outputs)) return -1;
  for (int i = 0; i < inputs; ++i) {
    const int wanted = description_.ranks[i], found = in[i].desc.dims.nbDims;
    if (found == wanted) continue;
    Say("input " + std::to_string(i) + " of " + description_.name + " has " + std::to_string(found) +
        " axes: it must have " + std::to_string(wanted));
    return -1;
  }
  return 0;
}

int32_t Node::getOutputDataTypes(DataType* out, int32_t outputs, const DataType* in, int32_t inputs) const noexcept {
  if (!Fits(inputs, outputs)) return -1;
  for (int i = 0; i < outputs; ++i) out[i] = description_.kinds[inputs + i] == Kind::kData ? in[0] : DataType::kFLOAT;
  return 0;
}

bool Node::supportsFormatCombination(int32_t at, const DynamicPluginTensorDesc* all, int32_t inputs,
                                     int32_t outputs) noexcept {
  if (!Fits(inputs, outputs) || at < 0 || at >= inputs + outputs) return false;
  const PluginTensorDesc& tensor = all[at].desc;
  if (tensor.format != TensorFormat::kLINEAR) return false;
  switch (description_.kinds[at]) {
    case Kind::kInt32:
      return tensor.type == DataType::kINT32;
    case Kind::kFloat:
      return tensor.type == DataType::kFLOAT;
    case Kind::kData:
      return at == 0 ? DataName(tensor.type) != nullptr : tensor.type == all[0].desc.type;
  }
  return false;
}

const PluginFieldCollection* Node::getFieldsToSerialize() noexcept {
  fields_ = Fields();
  collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
  return &collection_;
}

PluginField TextField(const char* name, const std::string& text) {
  return PluginField{name, text.data(), PluginFieldType::kCHAR, static_cast<int32_t>(text.size())};
}

namespace {
bool Is(const PluginField& field, const char* name, PluginFieldType type) {
  return field.name != nullptr && std::strcmp(field.name, name) == 0 && field.type == type && field.data != nullptr &&
         field.length > 0;
}
}  // namespace

bool ReadText(const PluginField& field, const char* name, std::string* text) {
  if (!Is(field, name, PluginFieldType::kCHAR)) return false;
  text->assign(static_cast<const char*>(field.data), static_cast<size_t>(field.length));
  text->resize(std::strlen(text->c_str()));  // some callers count the final zero
  return true;
}

bool ReadFloat(const PluginField& field, const char* name, float* number) {
  if (!Is(field, name, PluginFieldType::kFLOAT32) || field.length != 1) return false;
  std::memcpy(number, field.data, sizeof *number);
  return true;
}

bool IsBinding(const PluginField& field) {
  const std::string name = field.name == nullptr ? "" : field.name;
  return name == "plugin_namespace" || name == "plugin_version" || name == "aot";
}

IPluginV3* Creator::createPlugin(const char*, const PluginFieldCollection* given, TensorRTPhase) noexcept try {
  return make_(given);
} catch (const std::bad_alloc&) {
  return nullptr;
}

}  // namespace mosear::trt
