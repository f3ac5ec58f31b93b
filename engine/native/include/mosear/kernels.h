// Launches MoSEAR's kernels. Their binaries are inside the library, one for each architecture that it was built for.
//
//   const mosear::Kernel* kernel = mosear::FindKernel("decode_merge", "bf16", "llama2-7b decode 4096 x8");
//   CUresult status = kernel->Launch(stream, arguments);
//
// Every function returns an error instead of ending the process. A kernel may be launched from several threads and on
// several devices at once: its function is loaded at the first launch in a context and kept.
#ifndef MOSEAR_KERNELS_H_
#define MOSEAR_KERNELS_H_

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace mosear {

// One parameter of a kernel. Pointers take 8 bytes, scalars (int32) 4.
struct Parameter {
  const char* name;
  unsigned size;
  bool is_pointer;
};

struct Grid {
  unsigned x, y, z;
};

// One of the numbers that a kernel was compiled with, such as BLOCK_M; a truth value is 1 or 0.
struct Constant {
  const char* name;
  double value;
};

// A binary for one architecture: 80 to 89 run on the same major and no lower minor, 90 and above on that chip alone.
struct Variant {
  int arch;
  const unsigned char* image;
  const char* symbol;
  Grid grid;  // for the shape that the kernel's label names
  unsigned threads;
  unsigned shared_bytes;  // dynamic
  uint64_t aligned;       // bit i: parameter i must be a multiple of 16
  const Constant* constants;
  size_t constant_count;

  // The constant of that name; false where there is none.
  bool Find(std::string_view constant, double* value) const;
};

// What is passed for one parameter.
class Argument {
 public:
  static Argument Pointer(CUdeviceptr value) { return Argument(true, value); }
  static Argument Int32(int32_t value) { return Argument(false, static_cast<uint32_t>(value)); }
  bool is_pointer() const { return is_pointer_; }
  uint64_t bits() const { return bits_; }

 private:
  Argument(bool is_pointer, uint64_t bits) : is_pointer_(is_pointer), bits_(bits) {}
  bool is_pointer_;
  uint64_t bits_;
};

// One kernel for one element type, in the configuration for one shape.
class Kernel {
 public:
  constexpr Kernel(const char* name, const char* data, const char* label, const Parameter* parameters,
                   size_t parameter_count, const Variant* variants, size_t variant_count)
      : name_(name),
        data_(data),
        label_(label),
        parameters_(parameters),
        parameter_count_(parameter_count),
        variants_(variants),
        variant_count_(variant_count) {}

  std::string_view name() const { return name_; }
  std::string_view data() const { return data_; }
  std::string_view label() const { return label_; }
  size_t parameter_count() const { return parameter_count_; }
  const Parameter& parameter(size_t index) const { return parameters_[index]; }
  size_t variant_count() const { return variant_count_; }
  const Variant& variant(size_t index) const { return variants_[index]; }

  // The binary for a compute capability such as 86; nullptr where there is none.
  const Variant* Pick(int capability) const;

  // Launches on the current context's device with the label's own grid. `arguments`: the kernel's parameters in order.
  // CUDA_ERROR_INVALID_VALUE: wrong number, kind or alignment; CUDA_ERROR_NO_BINARY_FOR_GPU: no binary for the device;
  // CUDA_ERROR_OUT_OF_MEMORY: the host has none left; else what the driver returned.
  CUresult Launch(CUstream stream, const std::vector<Argument>& arguments) const;
  // The same with a grid of the caller's; an empty grid launches nothing and succeeds.
  CUresult Launch(CUstream stream, Grid grid, const std::vector<Argument>& arguments) const;

 private:
  CUresult LaunchOn(CUstream stream, const Grid* grid, const std::vector<Argument>& arguments) const;

  const char* name_;
  const char* data_;
  const char* label_;
  const Parameter* parameters_;
  size_t parameter_count_;
  const Variant* variants_;
  size_t variant_count_;
};

// Compute capability of the current context's device, 90 for 9.0.
CUresult CurrentCapability(int* capability);

// All kernels, in order of name, element type and label.
struct KernelList {
  const Kernel* first;
  size_t count;
  const Kernel* begin() const { return first; }
  const Kernel* end() const { return first + count; }
};
KernelList Kernels();

// The kernel `name` for element type `data` ("bf16", "fp16") in the configuration for `label`; nullptr if unknown.
const Kernel* FindKernel(std::string_view name, std::string_view data, std::string_view label);

}  // namespace mosear

#endif  // MOSEAR_KERNELS_H_
