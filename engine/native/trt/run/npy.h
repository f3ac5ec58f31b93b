// Tensors in files of numpy's format (.npy, version 1 to 3, C order).
#ifndef MOSEAR_TRT_RUN_NPY_H_
#define MOSEAR_TRT_RUN_NPY_H_

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace mosear::run {

struct Array {
  std::string kind;  // numpy's letter and bytes: f4, f2, i4, i8, u1, b1
  std::vector<int64_t> shape;
  std::vector<char> bytes;
};

// Both throw std::runtime_error naming the file and what is wrong with it.
Array ReadNpy(const std::filesystem::path& path);
void WriteNpy(const std::filesystem::path& path, const Array& array);

}  // namespace mosear::run

#endif  // MOSEAR_TRT_RUN_NPY_H_
