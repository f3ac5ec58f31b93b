// `mosear::ReallocatedAttention`: one node for prefill (many rows: one launch) and decode (one row: a split and a
// merge, partial results in the workspace).
#include <cstring>
#include <new>

#include "attention.h"
#include "node.h"

namespace mosear::trt {
namespace {

using namespace nvinfer1;

// query, key, value, key_group, query_position, key_length, first_row, policy_params, strength, group_bias; output,
// masses before and after.
const Description kDescription = {
    "ReallocatedAttention",
    {Kind::kData, Kind::kData, Kind::kData, Kind::kInt32, Kind::kInt32, Kind::kInt32, Kind::kInt32, Kind::kFloat,
     Kind::kFloat, Kind::kFloat, Kind::kData, Kind::kFloat, Kind::kFloat},
    {4, 4, 4, 2, 2, 1, 1, 2, 1, 2}};
constexpr int kBias = 9;

// Sizes from dimensions of query, key and group_bias.
Sizes SizesOf(const Dims& query, const Dims& key, const Dims& bias) {
  return Sizes{query.d[0], query.d[1], query.d[2], query.d[3], key.d[1], key.d[2], bias.d[1]};
}

class Attention final : public Node {
 public:
  explicit Attention(Attributes attributes) : Node(kDescription), attributes_(std::move(attributes)) {}

  IPluginV3* clone() noexcept override { return new (std::nothrow) Attention(attributes_); }

  int32_t getOutputShapes(const DimsExprs* in, int32_t inputs, const DimsExprs*, int32_t, DimsExprs* out,
                          int32_t outputs, IExprBuilder&) noexcept override {
    if (!Fits(inputs, outputs) || in[0].nbDims != 4 || in[kBias].nbDims != 2) return -1;
    out[0] = in[0];
    out[1] = in[0];
    out[1].d[3] = in[kBias].d[1];  // the groups
    out[2] = out[1];
    return 0;
  }

  size_t getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t inputs, const DynamicPluginTensorDesc*,
                          int32_t) const noexcept override {
    if (inputs != kDescription.inputs()) return 0;
    return WorkspaceBytes(SizesOf(in[0].max, in[1].max, in[kBias].max), in[0].min.d[2]);
  }

  int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* inputs, void* const* outputs,
                  void* workspace, cudaStream_t stream) noexcept override try {
    Tensors tensors{};
    std::memcpy(tensors.inputs, inputs, sizeof tensors.inputs);
    std::memcpy(tensors.outputs, outputs, sizeof tensors.outputs);
    const char* data = DataName(in[0].type);
    if (data == nullptr) return -1;
    std::string error;
    const CUresult status = Launch(attributes_, data, SizesOf(in[0].dims, in[1].dims, in[kBias].dims), tensors,
                                   workspace, reinterpret_cast<CUstream>(stream), &error);
    return status == CUDA_SUCCESS ? 0 : Refused(kDescription.name, status, error);
  } catch (const std::bad_alloc&) {
    return -1;
  }

 private:
  std::vector<PluginField> Fields() const override {
    return {TextField("policy", attributes_.policy), TextField("statistic", attributes_.statistic),
            PluginField{"scale", &attributes_.scale, PluginFieldType::kFLOAT32, 1}};
  }

  Attributes attributes_;
};

IPluginV3* Make(const PluginFieldCollection* given) {
  Attributes attributes;
  for (int32_t i = 0; given != nullptr && i < given->nbFields; ++i) {
    const PluginField& field = given->fields[i];
    if (ReadText(field, "policy", &attributes.policy) || ReadText(field, "statistic", &attributes.statistic) ||
        ReadFloat(field, "scale", &attributes.scale) || IsBinding(field))
      continue;
    Say(std::string("field '") + (field.name == nullptr ? "" : field.name) +
        "' of ReallocatedAttention is unknown or of a wrong type: policy, statistic (text), scale (float)");
    return nullptr;
  }
  if (attributes.Valid()) return new Attention(attributes);
  Say("ReallocatedAttention has policy '" + attributes.policy + "', statistic '" + attributes.statistic + "', scale " +
      std::to_string(attributes.scale) + ": off, balance or target; sum or mean; above 0");
  return nullptr;
}

}  // namespace

Creator& AttentionCreator() {
  static Creator creator(kDescription.name,
                         {PluginField{"policy", nullptr, PluginFieldType::kCHAR, 0},
                          PluginField{"statistic", nullptr, PluginFieldType::kCHAR, 0},
                          PluginField{"scale", nullptr, PluginFieldType::kFLOAT32, 1}},
                         &Make);
  return creator;
}

}  // namespace mosear::trt
