// What generate.py writes.
#ifndef MOSEAR_KERNELS_TABLE_H_
#define MOSEAR_KERNELS_TABLE_H_

#include "mosear/kernels.h"

namespace mosear {

extern const Kernel kKernels[];
extern const size_t kKernelCount;

}  // namespace mosear

#endif  // MOSEAR_KERNELS_TABLE_H_
