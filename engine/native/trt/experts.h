// Modality experts of linears that share an input, as one TensorRT plugin: which kernels a call launches, on what grid,
// with what workspace. No TensorRT here, so that it is tested without its headers.
#ifndef MOSEAR_TRT_EXPERTS_H_
#define MOSEAR_TRT_EXPERTS_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "mosear/kernels.h"

namespace mosear::trt {

// Sizes of a call: tokens, width d of x, and rows of the heads' matrices.
struct ExpertSizes {
  int64_t rows, width, groups, experts, a_rows, b_rows;
};

// What a node states.
struct ExpertAttributes {
  std::string select, route;
  std::vector<int64_t> columns;  // d_out of each linear
  float scale = 0;
  // Whether the words are known, the scale is a positive number and there are columns.
  bool Valid() const;
};

// Pointers of a call: base, x, group, gates_in, a, gate, b, weight, column_start; y, gates.
struct ExpertTensors {
  const void* inputs[9];
  void* outputs[2];
};

// Bytes for partial sums of up to so many rows, whatever the device.
size_t ExpertWorkspaceBytes(const ExpertAttributes& attributes, const ExpertSizes& most);
// Launches on the current context's device. `error` says what is missing where the result is not CUDA_SUCCESS.
CUresult LaunchExperts(const ExpertAttributes& attributes, const char* data, const ExpertSizes& sizes,
                       const ExpertTensors& tensors, void* workspace, CUstream stream, std::string* error);

}  // namespace mosear::trt

#endif  // MOSEAR_TRT_EXPERTS_H_
