// Reallocated attention as one TensorRT plugin: which kernels a call launches, on what grid, with what workspace.
// No TensorRT here, so that it is tested without its headers.
#ifndef MOSEAR_TRT_ATTENTION_H_
#define MOSEAR_TRT_ATTENTION_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "mosear/kernels.h"

namespace mosear::trt {

// Sizes of a call, by the letters of the contract; `splits` of a decode step.
struct Sizes {
  int64_t batch, heads, rows, head_size, kv_heads, capacity, groups;
};

// What a node states; the numbers are those that the kernels have as constants.
struct Attributes {
  std::string policy, statistic;
  float scale = 0;
  // Whether both words are known and the scale is a positive number.
  bool Valid() const;
};

// Pointers of a call, in the op's order.
struct Tensors {
  const void* inputs[10];
  void* outputs[3];
};

// Fewest splits that fill the device, as the Python launcher has it.
int64_t Splits(const Sizes& sizes, int64_t multiprocessors);
// Bytes for a decode step's partial results, whatever the device; 0 where a call cannot be one.
size_t WorkspaceBytes(const Sizes& most, int64_t fewest_rows);
// Launches on the current context's device. `error` says what is missing where the result is not CUDA_SUCCESS.
CUresult Launch(const Attributes& attributes, const char* data, const Sizes& sizes, const Tensors& tensors,
                void* workspace, CUstream stream, std::string* error);

}  // namespace mosear::trt

#endif  // MOSEAR_TRT_ATTENTION_H_
