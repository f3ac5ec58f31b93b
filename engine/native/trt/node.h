// What our plugins share: TensorRT's four interfaces in one object, types and formats from a description, fields,
// messages.
#ifndef MOSEAR_TRT_NODE_H_
#define MOSEAR_TRT_NODE_H_

#include <NvInfer.h>
#include <NvInferRuntime.h>

#include <string>
#include <vector>

namespace mosear::trt {

constexpr char kVersion[] = "1", kNamespace[] = "mosear";

// Element type of a tensor; kData is that of the node's first input, fp16 or bf16.
enum class Kind { kData, kInt32, kFloat };

// A node's tensors, inputs first, and how many axes each input has.
struct Description {
  const char* name;
  std::vector<Kind> kinds;
  std::vector<int> ranks;
  int inputs() const { return static_cast<int>(ranks.size()); }
  int outputs() const { return static_cast<int>(kinds.size()) - inputs(); }
};

void SetLoggerFinder(nvinfer1::ILoggerFinder* finder);
// An error, to TensorRT's logger where one was given.
void Say(const std::string& text);
// "fp16", "bf16", or nullptr for a type that no kernel has.
const char* DataName(nvinfer1::DataType type);
// A status of the driver as a message, unless there is a better one. Returns -1, TensorRT's failure.
int32_t Refused(const char* name, int status, const std::string& error);

class Node : public nvinfer1::IPluginV3,
             public nvinfer1::IPluginV3OneCore,
             public nvinfer1::IPluginV3OneBuild,
             public nvinfer1::IPluginV3OneRuntime {
 public:
  explicit Node(const Description& description) : description_(description) {}

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  const char* getPluginName() const noexcept override { return description_.name; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }
  int32_t getNbOutputs() const noexcept override { return description_.outputs(); }
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
                          const nvinfer1::DynamicPluginTensorDesc*, int32_t outputs) noexcept override;
  int32_t getOutputDataTypes(nvinfer1::DataType* out, int32_t outputs, const nvinfer1::DataType* in,
                             int32_t inputs) const noexcept override;
  bool supportsFormatCombination(int32_t at, const nvinfer1::DynamicPluginTensorDesc* all, int32_t inputs,
                                 int32_t outputs) noexcept override;
  int32_t onShapeChange(const nvinfer1::PluginTensorDesc*, int32_t, const nvinfer1::PluginTensorDesc*,
                        int32_t) noexcept override {
    return 0;
  }
  IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

 protected:
  bool Fits(int32_t inputs, int32_t outputs) const {
    return inputs == description_.inputs() && outputs == description_.outputs();
  }
  virtual std::vector<nvinfer1::PluginField> Fields() const = 0;

 private:
  const Description& description_;  // lives as long as the library
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

// A field of text; the pointer stays the caller's.
nvinfer1::PluginField TextField(const char* name, const std::string& text);
// Reads a field of that name and type; false where it is another.
bool ReadText(const nvinfer1::PluginField& field, const char* name, std::string* text);
bool ReadFloat(const nvinfer1::PluginField& field, const char* name, float* number);
// Fields for the ONNX parser alone.
bool IsBinding(const nvinfer1::PluginField& field);

// Makes nodes of one kind. `Make` reads a collection of fields, or says what is wrong and returns nullptr.
class Creator : public nvinfer1::IPluginCreatorV3One {
 public:
  using Maker = nvinfer1::IPluginV3* (*)(const nvinfer1::PluginFieldCollection* given);
  Creator(const char* name, std::vector<nvinfer1::PluginField> fields, Maker make)
      : name_(name), fields_(std::move(fields)), make_(make) {
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
  }
  const char* getPluginName() const noexcept override { return name_; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  nvinfer1::IPluginV3* createPlugin(const char*, const nvinfer1::PluginFieldCollection* given,
                                    nvinfer1::TensorRTPhase) noexcept override;

 private:
  const char* name_;
  std::vector<nvinfer1::PluginField> fields_;
  Maker make_;
  nvinfer1::PluginFieldCollection collection_{};
};

Creator& AttentionCreator();
Creator& ExpertsCreator();

}  // namespace mosear::trt

#endif  // MOSEAR_TRT_NODE_H_
