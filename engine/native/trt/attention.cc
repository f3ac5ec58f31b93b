#include "attention.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <initializer_list>
#include <vector>

#include "choose.h"

namespace mosear::trt {
namespace {

// As the Python side has them: policy_kernel.py and decode_launches.py.
constexpr std::array<const char*, 3> kPolicies = {"off", "balance", "target"};
constexpr std::array<const char*, 2> kStatistics = {"sum", "mean"};
constexpr int64_t kMinKeys = 128, kMaxKeys = 4096, kCtas = 2;
constexpr size_t kAlignment = 256;  // of each piece of the workspace
constexpr size_t kElement = 2;      // bytes of an activation, fp16 or bf16; averages of a split are in it

int64_t PowerOfTwo(int64_t number) {
  int64_t found = 1;
  while (found < number) found *= 2;
  return found;
}

template <size_t N>
int Code(const std::array<const char*, N>& words, const std::string& word) {
  const auto found = std::find(words.begin(), words.end(), word);
  return found == words.end() ? -1 : static_cast<int>(found - words.begin());
}

struct Partials {
  size_t output, max, sum, count, end;  // offsets in the workspace
};

Partials Layout(const Sizes& sizes, int64_t splits) {
  const auto aligned = [](size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; };
  const size_t slots = static_cast<size_t>(sizes.batch * splits * sizes.groups);
  const size_t rows = slots * static_cast<size_t>(sizes.heads);
  Partials found{};
  found.max = aligned(kElement * rows * static_cast<size_t>(sizes.head_size));
  found.sum = found.max + aligned(4 * rows);
  found.count = found.sum + aligned(4 * rows);
  found.end = found.count + aligned(4 * slots);
  return found;
}

CUresult Prefill(const Wanted& policy, double scale, const char* data, const Sizes& sizes, const Tensors& tensors,
                 int capability, CUstream stream, std::string* error) {
  std::vector<Argument> arguments;
  for (const void* input : tensors.inputs) arguments.push_back(Address(input));
  for (int64_t scalar : {sizes.heads, sizes.kv_heads, sizes.rows, sizes.capacity}) arguments.push_back(Number(scalar));
  for (const void* output : tensors.outputs) arguments.push_back(Address(output));
  Wanted wanted = policy;
  wanted.insert(wanted.end(), {{"SCALE", scale}, {"CAUSAL", 1}});
  const Variant* variant;
  const Kernel* kernel = Choose("prefill", data, wanted, arguments, capability, 0, &variant, error);
  if (kernel == nullptr) return CUDA_ERROR_NO_BINARY_FOR_GPU;
  const int64_t block = ConstantOf(*variant, "BLOCK_M");
  if (block < 1) return CUDA_ERROR_INVALID_IMAGE;
  const Grid grid{static_cast<unsigned>(CeilDiv(sizes.rows, block)), static_cast<unsigned>(sizes.heads),
                  static_cast<unsigned>(sizes.batch)};
  return kernel->Launch(stream, grid, arguments);
}

CUresult Decode(const Wanted& policy, double scale, const char* data, const Sizes& sizes, const Tensors& tensors,
                int64_t splits, int capability, void* workspace, CUstream stream, std::string* error) {
  const Partials at = Layout(sizes, splits);
  std::vector<Argument> partials;
  for (size_t offset : {at.output, at.max, at.sum, at.count})
    partials.push_back(Address(static_cast<char*>(workspace) + offset));
  std::vector<Argument> split;
  for (int i = 0; i < 6; ++i) split.push_back(Address(tensors.inputs[i]));  // query to key_length
  for (int64_t scalar : {sizes.heads, sizes.kv_heads, sizes.capacity, splits}) split.push_back(Number(scalar));
  split.insert(split.end(), partials.begin(), partials.end());
  const double groups = static_cast<double>(sizes.groups), size = static_cast<double>(sizes.head_size);
  const Wanted tile = {{"GROUPS", groups},
                       {"D", size},
                       {"SCALE", scale},
                       {"CAUSAL", 1},
                       {"PITCH", static_cast<double>(PowerOfTwo(sizes.heads / sizes.kv_heads))}};
  std::vector<Argument> merge = partials;
  for (int i : {4, 6, 7, 8, 9})
    merge.push_back(Address(tensors.inputs[i]));  // position, first_row, policy, strength, bias
  for (int64_t scalar : {sizes.heads, splits}) merge.push_back(Number(scalar));
  for (const void* output : tensors.outputs) merge.push_back(Address(output));
  const Variant* variant;
  const Kernel* first = Choose("decode_split", data, tile, split, capability, 0, &variant, error);
  const Kernel* second =
      first == nullptr ? nullptr : Choose("decode_merge", data, policy, merge, capability, 0, &variant, error);
  if (second == nullptr) return CUDA_ERROR_NO_BINARY_FOR_GPU;
  const auto size_of = [](int64_t n) { return static_cast<unsigned>(n); };
  const Grid parts{size_of(splits), size_of(sizes.kv_heads), size_of(sizes.batch)};
  if (CUresult status = first->Launch(stream, parts, split)) return status;
  return second->Launch(stream, Grid{size_of(sizes.heads), size_of(sizes.batch), 1}, merge);
}

}  // namespace

bool Attributes::Valid() const {
  return Code(kPolicies, policy) >= 0 && Code(kStatistics, statistic) >= 0 && std::isfinite(scale) && scale > 0;
}

int64_t Splits(const Sizes& sizes, int64_t multiprocessors) {
  const int64_t wanted = CeilDiv(kCtas * multiprocessors, sizes.batch * sizes.kv_heads);
  return std::max({std::min(wanted, CeilDiv(sizes.capacity, kMinKeys)), CeilDiv(sizes.capacity, kMaxKeys), int64_t{1}});
}

size_t WorkspaceBytes(const Sizes& most, int64_t fewest_rows) {
  if (fewest_rows > 1) return 0;
  return Layout(most, std::max(CeilDiv(most.capacity, kMinKeys), int64_t{1})).end;
}

CUresult Launch(const Attributes& attributes, const char* data, const Sizes& sizes, const Tensors& tensors,
                void* workspace, CUstream stream, std::string* error) {
  if (sizes.batch == 0 || sizes.rows == 0) return CUDA_SUCCESS;
  int capability, multiprocessors;
  CUdevice device;
  if (CUresult status = CurrentCapability(&capability)) return status;
  if (CUresult status = cuCtxGetDevice(&device)) return status;
  if (CUresult status = cuDeviceGetAttribute(&multiprocessors, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device))
    return status;
  const Wanted policy = {{"POLICY", Code(kPolicies, attributes.policy)},
                         {"STATISTIC", Code(kStatistics, attributes.statistic)},
                         {"GROUPS", static_cast<double>(sizes.groups)},
                         {"D", static_cast<double>(sizes.head_size)}};
  if (sizes.rows > 1) return Prefill(policy, attributes.scale, data, sizes, tensors, capability, stream, error);
  return Decode(policy, attributes.scale, data, sizes, tensors, Splits(sizes, multiprocessors), capability, workspace,
                stream, error);
}

}  // namespace mosear::trt
