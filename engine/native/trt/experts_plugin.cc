// `mosear::ModalityExpertsColumns`: the experts of one linear, or of several that share an input, their columns side by
// side in base and y. Two launches, partial sums in the workspace.
#include <charconv>
#include <cstring>
#include <new>

#include "experts.h"
#include "node.h"

namespace mosear::trt {
namespace {

using namespace nvinfer1;

// base, x, group, gates_in, a, gate, b, weight, column_start; y, gates.
const Description kDescription = {"ModalityExpertsColumns",
                                  {Kind::kData, Kind::kData, Kind::kInt32, Kind::kFloat, Kind::kData, Kind::kData,
                                   Kind::kData, Kind::kFloat, Kind::kInt32, Kind::kData, Kind::kFloat},
                                  {3, 3, 2, 3, 2, 2, 2, 1, 1}};
enum { kBase, kX, kGroup, kGatesIn, kA, kGate, kB, kWeight, kColumnStart };

std::vector<int64_t> Columns(const std::string& text) {
  std::vector<int64_t> found;
  for (const char *at = text.data(), *end = at + text.size(); at < end;) {
    int64_t number = 0;
    const auto [next, failure] = std::from_chars(at, end, number);
    if (failure != std::errc() || (next != end && *next != ',')) return {};
    found.push_back(number);
    at = next + 1;
  }
  return found;
}

// `in`: dimensions of the inputs, by their number.
template <typename DimsAt>
ExpertSizes SizesOf(const DimsAt& in, size_t linears) {
  const Dims group = in(kGroup), gates = in(kGatesIn);
  return ExpertSizes{group.d[0] * group.d[1],
                     in(kX).d[2],
                     in(kWeight).d[0],
                     gates.d[2] / static_cast<int64_t>(linears),
                     in(kA).d[0],
                     in(kB).d[0]};
}

class Experts final : public Node {
 public:
  Experts(ExpertAttributes attributes, std::string columns)
      : Node(kDescription), attributes_(std::move(attributes)), columns_(std::move(columns)) {}

  IPluginV3* clone() noexcept override { return new (std::nothrow) Experts(attributes_, columns_); }

  int32_t getOutputShapes(const DimsExprs* in, int32_t inputs, const DimsExprs*, int32_t, DimsExprs* out,
                          int32_t outputs, IExprBuilder&) noexcept override {
    if (!Fits(inputs, outputs)) return -1;
    out[0] = in[kBase];
    out[1] = in[kGatesIn];
    return 0;
  }

  size_t getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t inputs, const DynamicPluginTensorDesc*,
                          int32_t) const noexcept override {
    if (inputs != kDescription.inputs()) return 0;
    return ExpertWorkspaceBytes(attributes_, SizesOf([in](int i) { return in[i].max; }, attributes_.columns.size()));
  }

  int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* inputs, void* const* outputs,
                  void* workspace, cudaStream_t stream) noexcept override try {
    ExpertTensors tensors{};
    std::memcpy(tensors.inputs, inputs, sizeof tensors.inputs);
    std::memcpy(tensors.outputs, outputs, sizeof tensors.outputs);
    const char* data = DataName(in[0].type);
    if (data == nullptr) return -1;
    std::string error;
    const ExpertSizes sizes = SizesOf([in](int i) { return in[i].dims; }, attributes_.columns.size());
    const CUresult status =
        LaunchExperts(attributes_, data, sizes, tensors, workspace, reinterpret_cast<CUstream>(stream), &error);
    return status == CUDA_SUCCESS ? 0 : Refused(kDescription.name, status, error);
  } catch (const std::bad_alloc&) {
    return -1;
  }

 private:
  std::vector<PluginField> Fields() const override {
    return {TextField("columns", columns_), TextField("select", attributes_.select),
            TextField("route", attributes_.route),
            PluginField{"scale", &attributes_.scale, PluginFieldType::kFLOAT32, 1}};
  }

  ExpertAttributes attributes_;
  std::string columns_;  // as the field says them: "576,192"
};

IPluginV3* Make(const PluginFieldCollection* given) {
  ExpertAttributes attributes;
  std::string columns;
  for (int32_t i = 0; given != nullptr && i < given->nbFields; ++i) {
    const PluginField& field = given->fields[i];
    if (ReadText(field, "columns", &columns) || ReadText(field, "select", &attributes.select) ||
        ReadText(field, "route", &attributes.route) || ReadFloat(field, "scale", &attributes.scale) || IsBinding(field))
      continue;
    Say(std::string("field '") + (field.name == nullptr ? "" : field.name) +
        "' of ModalityExpertsColumns is unknown or of a wrong type: columns, select, route (text), scale (float)");
    return nullptr;
  }
  attributes.columns = Columns(columns);
  if (attributes.Valid()) return new Experts(attributes, columns);
  Say("ModalityExpertsColumns has columns '" + columns + "', select '" + attributes.select + "', route '" +
      attributes.route + "', scale " + std::to_string(attributes.scale) +
      ": numbers between commas; soft or top1; token or modality; above 0");
  return nullptr;
}

}  // namespace

Creator& ExpertsCreator() {
  static Creator creator(kDescription.name,
                         {PluginField{"columns", nullptr, PluginFieldType::kCHAR, 0},
                          PluginField{"select", nullptr, PluginFieldType::kCHAR, 0},
                          PluginField{"route", nullptr, PluginFieldType::kCHAR, 0},
                          PluginField{"scale", nullptr, PluginFieldType::kFLOAT32, 1}},
                         &Make);
  return creator;
}

}  // namespace mosear::trt
