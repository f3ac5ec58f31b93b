#include "experts.h"

#include <algorithm>
#include <cmath>

#include "choose.h"

namespace mosear::trt {
namespace {

constexpr int64_t kMostParts = 16;  // parts of d of any configuration: modality_experts/launches.py
constexpr char kSoft[] = "soft", kTop1[] = "top1", kToken[] = "token", kModality[] = "modality";

// R: rows of b are groups, experts and ranks.
int64_t Rank(const ExpertSizes& sizes) { return sizes.b_rows / std::max<int64_t>(1, sizes.groups * sizes.experts); }

}  // namespace

bool ExpertAttributes::Valid() const {
  return (select == kSoft || select == kTop1) && (route == kToken || route == kModality) && std::isfinite(scale) &&
         scale > 0 && !columns.empty() && *std::min_element(columns.begin(), columns.end()) > 0;
}

size_t ExpertWorkspaceBytes(const ExpertAttributes& attributes, const ExpertSizes& most) {
  const int64_t sums = static_cast<int64_t>(attributes.columns.size()) * (Rank(most) + most.experts);
  return static_cast<size_t>(4 * kMostParts * most.rows * sums);
}

CUresult LaunchExperts(const ExpertAttributes& attributes, const char* data, const ExpertSizes& sizes,
                       const ExpertTensors& tensors, void* workspace, CUstream stream, std::string* error) {
  if (sizes.rows == 0) return CUDA_SUCCESS;
  int capability;
  if (CUresult status = CurrentCapability(&capability)) return status;
  const auto targets = static_cast<int64_t>(attributes.columns.size());
  int64_t columns = 0;
  for (int64_t each : attributes.columns) columns += each;
  const Wanted both = {{"TARGETS", static_cast<double>(targets)},
                       {"GROUPS", static_cast<double>(sizes.groups)},
                       {"EXPERTS", static_cast<double>(sizes.experts)},
                       {"RANK", static_cast<double>(Rank(sizes))},
                       {"GATED", attributes.route == kToken ? 1 : 0}};
  const auto& [base, x, group, gates_in, a, gate, b, weight, column_start] = tensors.inputs;
  const std::vector<Argument> shrink = {Address(x),         Address(group),      Address(a),        Address(gate),
                                        Number(sizes.rows), Number(sizes.width), Address(workspace)};
  Wanted first = both;
  first.push_back({"SHARE_A", sizes.a_rows == targets * Rank(sizes) ? 1 : 0});
  const Variant *down, *up;
  const Kernel* shrinks = Choose("modality_experts_shrink", data, first, shrink, capability, sizes.rows, &down, error);
  if (shrinks == nullptr) return CUDA_ERROR_NO_BINARY_FOR_GPU;
  const int64_t parts = ConstantOf(*down, "SPLITS");
  const std::vector<Argument> expand = {Address(base),
                                        Address(group),
                                        Address(workspace),
                                        Address(gates_in),
                                        Address(b),
                                        Address(weight),
                                        Address(column_start),
                                        Number(sizes.rows),
                                        Number(columns),
                                        Address(tensors.outputs[0]),
                                        Address(tensors.outputs[1])};
  Wanted second = both;
  second.insert(second.end(), {{"SCALE", attributes.scale},
                               {"TOP1", attributes.select == kTop1 ? 1 : 0},
                               {"SPLITS", static_cast<double>(parts)}});
  const Kernel* expands = Choose("modality_experts_expand", data, second, expand, capability, sizes.rows, &up, error);
  if (expands == nullptr) return CUDA_ERROR_NO_BINARY_FOR_GPU;
  const int64_t rows_down = ConstantOf(*down, "BLOCK_M"), rows_up = ConstantOf(*up, "BLOCK_M"),
                columns_up = ConstantOf(*up, "BLOCK_N");
  if (rows_down < 1 || rows_up < 1 || columns_up < 1 || parts < 1 || parts > kMostParts)
    return CUDA_ERROR_INVALID_IMAGE;
  const auto size = [](int64_t n) { return static_cast<unsigned>(n); };
  const int64_t widest = *std::max_element(attributes.columns.begin(), attributes.columns.end());
  const Grid shrink_grid{size(CeilDiv(sizes.rows, rows_down)), size(parts), 1};
  const Grid expand_grid{size(CeilDiv(sizes.rows, rows_up)), size(CeilDiv(widest, columns_up)), size(targets)};
  if (CUresult status = shrinks->Launch(stream, shrink_grid, shrink)) return status;
  return expands->Launch(stream, expand_grid, expand);
}

}  // namespace mosear::trt
