// Which embedded kernel serves a call: by the constants that it was compiled with, and what its binary assumes.
#ifndef MOSEAR_TRT_CHOOSE_H_
#define MOSEAR_TRT_CHOOSE_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "mosear/kernels.h"

namespace mosear::trt {

// Constants that a kernel must have been compiled with; a truth value is 1 or 0.
using Wanted = std::vector<std::pair<const char*, double>>;

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline Argument Address(const void* pointer) { return Argument::Pointer(reinterpret_cast<CUdeviceptr>(pointer)); }
inline Argument Number(int64_t value) { return Argument::Int32(static_cast<int32_t>(value)); }

// A kernel of that name and element type whose constants and assumptions fit, and its binary for the device. `rows`: of
// kernels whose label ends in "rows N", which serve up to N, the one with the fewest; 0: the first of any label.
// nullptr where none fits; `error` then says what was asked for.
const Kernel* Choose(const char* name, const char* data, const Wanted& wanted, const std::vector<Argument>& arguments,
                     int capability, int64_t rows, const Variant** variant, std::string* error);

// A constant of a binary that its kernel is known to have.
int64_t ConstantOf(const Variant& variant, const char* name);

}  // namespace mosear::trt

#endif  // MOSEAR_TRT_CHOOSE_H_
